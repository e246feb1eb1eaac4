"""What source and result write after the same held-out text: samples.json of a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.config import Recipe, load_recipe
from efficientllm.data.corpus import Corpus, load_corpora
from efficientllm.data.rows import CONTEXT
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
        recipe = load_recipe(path / "config.yaml", ["prune=null"], dumped=True)  # it may be no choice any more
        content = samples(recipe, RunFolder(path))
    except Exception as error:  # the report that asked for them is about more than these
        say(f"no sample generations for {path}: {error}")
        return
    write_json(out, content, ascii_only=False)


def samples(recipe: Recipe, folder: RunFolder) -> list[dict[str, Any]]:
    """prompt, source, result: texts; source is None where the run began from random weights."""
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.source)
    prompts = _prompts(load_corpora(recipe.data, tokenizer, trains=False)[1])
    device = choose_device(recipe.train.device)
    texts: dict[str, list[str] | None] = {"source": None}
    with track("sample generations", 2 * len(prompts)) as bar:
        if recipe.init == "pretrained":
            texts["source"] = _continue(load_model(recipe.source, device=device), tokenizer, prompts, bar.advance)
        result = load_model(str(folder.model), device=device)
        own: Any = load_tokenizer(str(folder.model))
        if own.get_vocab() == tokenizer.get_vocab():
            spelt = prompts
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


def _prompts(held_out: Sequence[Corpus]) -> list[torch.Tensor]:
    """The beginnings of rows spread over the largest corpus, int64 (tokens,): where there are conversations, of the
    largest of these each up to its first answer, as the chat template asks for it."""
    marked = [(corpus, corpus.rows.marks(np.asarray(spread(len(corpus), SAMPLES)))) for corpus in held_out]
    chats = [(corpus, marks) for corpus, marks in marked if marks is not None]
    corpus, marks = max(chats or marked, key=lambda each: len(each[0]))
    rows = token_ids(corpus.take(spread(len(corpus), SAMPLES)))
    if marks is None:
        return list(rows[:, : min(PROMPT_TOKENS, rows.shape[1] // 2)])
    return [row[:first] for row, first in zip(rows, (marks & CONTEXT == 0).argmax(1).tolist(), strict=True)]


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[torch.Tensor],
    tick: Callable[[int], None],
) -> list[str]:
    texts = []
    for prompt in prompts:
        ids, room = prompt[None].to(model.device), model.config.max_position_embeddings - len(prompt)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": min(NEW_TOKENS, room), "use_cache": True}
        made: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id, **options
        )
        texts.append(str(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)))
        tick(1)
    return texts
