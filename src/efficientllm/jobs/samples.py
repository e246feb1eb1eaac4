"""What source and result write after the same held-out text: samples.json of a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.config import Recipe, load_recipe
from efficientllm.data.corpus import load_corpora
from efficientllm.evaluation.validation import spread
from efficientllm.files import write_json
from efficientllm.jobs.device import choose_device
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.models.loading import load_model, load_tokenizer
from efficientllm.reporting.progress import track
from efficientllm.training.gradient import token_ids

SAMPLES = 3
PROMPT_TOKENS, NEW_TOKENS = 32, 64


def write_samples(path: Path, say: Callable[[str], None]) -> None:
    """Once, for a finished run. Where the source or its text is not at hand any more, that is said and left out."""
    out = path / "samples.json"
    if out.is_file() or not (path / "summary.json").is_file():
        return
    try:
        recipe = load_recipe(path / "config.yaml", dumped=True)
        content = samples(recipe, RunFolder(path))
    except Exception as error:  # the report that asked for them is about more than these
        say(f"no sample generations for {path}: {error}")
        return
    write_json(out, content, ascii_only=False)


def samples(recipe: Recipe, folder: RunFolder) -> list[dict[str, Any]]:
    """prompt, source, result: texts; source is None where the run began from random weights."""
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.source)
    corpus = max(load_corpora(recipe.data, tokenizer, trains=False)[1], key=len)
    room = min(PROMPT_TOKENS, recipe.data.sequence_length // 2)
    prompts = token_ids(corpus.take(spread(len(corpus), SAMPLES)))[:, :room]
    device = choose_device(recipe.train.device)
    texts: dict[str, list[str] | None] = {"source": None}
    with track("sample generations", 2 * len(prompts)) as bar:
        if recipe.init == "pretrained":
            texts["source"] = _continue(load_model(recipe.source, device=device), tokenizer, list(prompts), bar.advance)
        result = load_model(str(folder.model), device=device)
        own: Any = load_tokenizer(str(folder.model))
        if own.get_vocab() == tokenizer.get_vocab():
            spelt = list(prompts)
        else:  # tokens have fallen
            spelt = [torch.tensor(own(tokenizer.decode(each), add_special_tokens=False).input_ids) for each in prompts]
        written = _continue(result, own, spelt, bar.advance)
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "source": None if texts["source"] is None else texts["source"][index],
            "result": written[index],
        }
        for index, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[torch.Tensor], tick: Callable[[int], None]
) -> list[str]:
    texts, room = [], model.config.max_position_embeddings - max(map(len, prompts))
    for prompt in prompts:
        ids = prompt[None].to(model.device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": min(NEW_TOKENS, room), "use_cache": True}
        made: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id, **options
        )
        texts.append(str(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)))
        tick(1)
    return texts
