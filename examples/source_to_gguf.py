# %% [markdown]
# # From a pretrained source to a file that llama.cpp runs
#
# Run it cell by cell in an editor that knows `# %%`, or whole:
#
#     python examples/source_to_gguf.py [SOURCE_FOLDER_OR_HUB_ID TEXT_FILE]
#
# Without arguments it makes a toy source from Python's own standard library, so that it runs anywhere in a minute; its
# text is then no more than a hint of Python. Needs `pip install "efficientllm[gguf]"`.

# %%
import sys
from pathlib import Path

from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, prepare_corpus, stage_recipe, write_architecture
from efficientllm.export.check import check_hf
from efficientllm.export.gguf import export_gguf
from efficientllm.export.hf import export_hf
from efficientllm.export.subject import subject_of
from efficientllm.jobs.prune import run
from efficientllm.jobs.report import write_report


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


folder = Path("runs/source-to-gguf")

# %% [markdown]
# ## 1. A source and text
#
# Any supported decoder (README.md, `source`) in the hub's format, and text of the kind that it was trained on.

# %%
if len(sys.argv) == 2:
    sys.exit("error: name a source and a text file, or neither: source_to_gguf.py [SOURCE TEXT_FILE]")
if len(sys.argv) > 2:
    source, train, held_out = sys.argv[1], sys.argv[2], {}
    length, tokens, batch = 1024, "60M", "32K"
    rate = 5e-4  # as in recipes/: what has been trained wants a gentler rate than what begins
else:
    size = DemoSize(
        vocabulary=512, hidden=64, layers=2, heads=2, intermediate=192, sequence_length=128, batch_tokens=2048
    )
    corpus = prepare_corpus(folder, size, say)
    start = write_architecture(folder, corpus, size)
    run(Recipe.model_validate(stage_recipe(folder, "source", start, 100_000, size) | {"init": "random"}), say)
    source, train = str(folder / "source" / "model"), str(corpus / "train.jsonl")
    held_out = {"validation": str(corpus / "validation.jsonl")}
    length, tokens, batch, rate = 128, "60K", "2K", 1.5e-3

# %% [markdown]
# ## 2. Prune it while it trains
#
# The same dictionary as YAML is a recipe; the same call on an existing run folder goes on with it.

# %%
recipe = Recipe.model_validate(
    {
        "source": source,
        "data": {"train": train, "sequence_length": length} | held_out,
        "train": {"tokens": tokens, "batch_tokens": batch, "micro_batch": 8, "lr": rate},
        "prune": {"target": "50%", "end": "40%"},
        "run": {"dir": str(folder / "run"), "validation_tokens": "16K"},
    }
)
summary = run(recipe, say)
before, after = summary["source"], summary["result"]
print(f"{before['parameters']:,} -> {after['parameters']:,} parameters")
print(f"validation loss {before['validation_loss']:.3f} -> {after['validation_loss']:.3f}")

# %% [markdown]
# ## 3. Look at it

# %%
print(write_report([Path(recipe.run.dir)], Path(recipe.run.dir), say))

# %% [markdown]
# ## 4. One file for the device
#
# In bf16 for transformers, where `check_hf` holds the exported folder against the run's model in fresh processes; as
# GGUF for llama.cpp and what is built on it: `python examples/edge/chat.py FILE` talks to it.

# %%
result = subject_of(Path(recipe.run.dir))
exported = export_hf(result, "bfloat16", out=folder / "hf", overwrite=True, say=say)
check_hf(result.folder, exported, "bfloat16", say)
file = export_gguf(result, "q8_0", overwrite=True, say=say)
print(f"{file}: {file.stat().st_size:,} bytes")
