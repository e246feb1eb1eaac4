"""The model card: a README.md beside the result that says what it is, how it was made and what it cannot do."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from efficientllm.reporting.card_metadata import (
    base_model,
    described_data,
    kind_of,
    last_component,
    metadata,
    title_of,
)
from efficientllm.reporting.evaluation_table import evaluation_table, evaluation_way
from efficientllm.reporting.journal import write_atomically
from efficientllm.sizes import format_count

WIDTH_NAMES = {
    "layers": "layers",
    "hidden": "hidden size",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "intermediate": "FFN channels",
}

_TEMPLATE = """\
---
{front}---

# {title}

{origin}

{table}

Losses are nats per token on the validation text of this run; perplexity is their exponential.
{evaluation}
## How to load it

{usage}

## How it was made

{tokens} training tokens, {events} pruning events and {compactions} compactions in {duration},
with efficientllm {efficientllm}, torch {torch} and transformers {transformers}.
{data} The recipe:

{fence}yaml
{recipe}
{fence}

## Limits

- {comparison} Other text, tasks and languages were not measured.
{limits}- The licence of the source and the terms of the training text apply to it; this card grants nothing.
"""


TRANSFORMERS_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

It is an ordinary transformers model: no code of its own, every layer of the same shape, nothing masked."""
_ORIGINS = {
    "pruned": "{result_count} parameters, made from {source_name} ({source_count} parameters) by pruning-aware "
    "pretraining: the\nleast salient structure was removed a little at a time while the model kept training.",
    "trained": "{result_count} parameters: {source_name}, trained on. Nothing was pruned.",
    "random": "{result_count} parameters in the shape of {source_name}, trained from random weights. Nothing was "
    "pruned.",
}
_TITLES = {
    "pruned": "{name}, pruned to {count}",
    "trained": "{name}, trained on",
    "random": "{name}'s shape, from scratch",
}
_INHERITS = """\
- It predicts text as its source does: it inherits what the source got wrong, its biases and its context length,
  and it is not tuned to follow instructions or to refuse unless the source was and the training text kept that up.
"""
_SMALLER = "- It is smaller than its source and knows less. Check what it says.\n"


def write_model_card(folder: Path | str, facts: Mapping[str, Any]) -> Path:
    """Write README.md into `folder` from the facts of summary.json and return its path."""
    path = Path(folder) / "README.md"
    write_atomically(path, model_card(facts).encode())
    return path


def model_card(
    facts: Mapping[str, Any], *, usage: str = TRANSFORMERS_USAGE, extra: Mapping[str, Any] | None = None
) -> str:
    """The text of a card: `usage` under "How to load it", `extra` over its metadata.

    `facts` has "source" and "result" ("path", "parameters", "widths", "validation_loss" in nats or None), "tokens",
    "events", "compactions", "seconds", the versions "efficientllm", "torch", "transformers", and "recipe" (YAML);
    it may have "license" and "evaluation" (see evaluation_rows), and source "on_disk" (see hub_id).
    Absolute paths are shown by their last component: the card is published, the machine's folders are not.
    """
    source, result = facts["source"], facts["result"]
    base, kind = base_model(source), kind_of(facts)
    names = {
        "result_count": format_count(result["parameters"]),
        "source_name": f"[{base}](https://huggingface.co/{base})" if base else f"`{title_of(source)}`",
        "source_count": format_count(source["parameters"]),
    }
    recipe = _without_absolute_paths(str(facts["recipe"])).strip("\n")
    return _TEMPLATE.format(
        front=yaml.safe_dump(metadata(facts) | dict(extra or {}), sort_keys=False),
        title=card_title(facts),
        origin=_ORIGINS[kind].format(**names),
        limits=(_INHERITS if kind != "random" else "") + (_SMALLER if kind == "pruned" else ""),
        table=_table(source, result),
        evaluation=_evaluation(facts.get("evaluation")),
        usage=usage,
        tokens=format_count(facts["tokens"]),
        events=facts["events"],
        compactions=facts["compactions"],
        duration=_duration(facts["seconds"]),
        efficientllm=facts["efficientllm"],
        torch=facts["torch"],
        transformers=facts["transformers"],
        data=described_data(facts),
        fence=_fence(recipe),
        recipe=recipe,
        comparison=_comparison(source.get("validation_loss"), result.get("validation_loss")),
    )


def card_title(facts: Mapping[str, Any]) -> str:
    """The card's heading, such as "SmolLM-1.7B, pruned to 469.1M"."""
    count = format_count(facts["result"]["parameters"])
    return _TITLES[kind_of(facts)].format(name=title_of(facts["source"]), count=count)


def _evaluation(results: Any) -> str:
    table = evaluation_table(results)
    if table is None:
        return ""
    way = evaluation_way(results)
    return f"\nMeasured with `efficientllm eval`{f' ({way})' if way else ''}:\n\n{table}\n"


def _table(source: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    share = result["parameters"] / source["parameters"]
    rows: list[tuple[str, ...]] = [
        ("", "source", "compact"),
        ("---", "---:", "---:"),
        ("parameters", f"{source['parameters']:,}", f"{result['parameters']:,} ({share:.1%})"),
    ]
    for key, name in WIDTH_NAMES.items():
        if key in result["widths"]:
            rows.append((name, str(source["widths"].get(key, "")), str(result["widths"][key])))
    losses = source.get("validation_loss"), result.get("validation_loss")
    rows.append(("validation loss", *(_number(loss, loss) for loss in losses)))
    rows.append(("perplexity", *(_number(loss, _perplexity(loss)) for loss in losses)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))  # beyond it a double overflows


def _number(loss: float | None, value: float | None) -> str:
    if loss is None or value is None or not math.isfinite(loss):
        return "not measured" if loss is None else "not finite"
    return f"{value:.4g}" if value >= 1000 else f"{value:.3f}"


def _comparison(source: float | None, result: float | None) -> str:
    if source is None or result is None:
        return "No validation text was given, so nothing is known of its quality."
    if not math.isfinite(result - source):
        return "Its loss is not a finite number: the run diverged, do not use it."
    way = "worse" if result > source else "better"
    return f"On the validation text it is {abs(result - source):.3f} nats per token {way} than the source."


def _without_absolute_paths(recipe: str) -> str:
    """Replace each absolute path that is a value of the recipe by its last component; the layout stays."""
    paths = {text for text in _strings(yaml.safe_load(recipe)) if re.match(r"[/~\\]|[A-Za-z]:[/\\]", text)}
    for path in sorted(paths, key=len, reverse=True):  # a folder must not be cut out of the paths inside it
        recipe = recipe.replace(path, last_component(path))
    return recipe


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _fence(text: str) -> str:
    """Return a run of backticks longer than any in `text`."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
