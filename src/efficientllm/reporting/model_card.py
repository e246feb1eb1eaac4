"""The model card: a text beside a model that says what it is, how it was made and what it cannot do.

README.md in a model folder, NAME.md beside NAME.gguf. Its block of metadata is what the hub reads
(https://huggingface.co/docs/hub/model-cards); what is not known is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from efficientllm.files import write_atomically
from efficientllm.reporting.card_sources import datasets_of, described_data, hub_id, title_of, without_absolute_paths
from efficientllm.reporting.evaluation_table import evaluation_way, measured, measured_rows
from efficientllm.reporting.tables import EXPERT_LABELS, WIDTH_LABELS, markdown
from efficientllm.reporting.templates import rendered
from efficientllm.sizes import format_count

README = "README.md"
MARK = "efficientllm"  # the tag by which a card of ours is known
_TITLES = {
    "pruned": "{name}, pruned to {count}",
    "trained": "{name}, trained on",
    "random": "{name}'s shape, from scratch",
}
_SUMMARIES = {
    "pruned": "pruned while it kept training, from",
    "trained": "trained on from",
    "random": "trained from random weights in the shape of",
}


@dataclass(frozen=True)
class GGUF:
    """What the card of a GGUF file says of it."""

    file: str
    kind: str
    architecture: str


@dataclass(frozen=True)
class Card:
    """What is known of a model of `parameters` weights.

    run: the facts of summary.json, None for a model of no run here: "source" and "result" ("path", "parameters",
    "widths", "validation_loss" in nats or None), "tokens", "events", "compactions", "seconds", the versions
    "efficientllm", "torch", "transformers", and "recipe" (YAML); source may have "on_disk" (see hub_id).
    licence: one of the hub's identifiers. evaluation: see `measured`. name, shape: of a model of no run, its own name
    and a sentence on its shape.
    """

    parameters: int
    run: Mapping[str, Any] | None = None
    licence: str | None = None
    evaluation: Any = None
    name: str = ""
    shape: str = ""

    @cached_property
    def kind(self) -> str | None:
        """What a run has made: "pruned", "trained" (from its source's weights) or "random" (from none)."""
        if self.run is None:
            return None
        if self.run["result"]["parameters"] < self.run["source"]["parameters"]:
            return "pruned"
        return "random" if self.run["source"].get("init") == "random" else "trained"

    @property
    def title(self) -> str:
        """The card's heading, such as "SmolLM-1.7B, pruned to 469.1M"."""
        if self.run is None or self.kind is None:
            return self.name
        return _TITLES[self.kind].format(
            name=title_of(self.run["source"]), count=format_count(self.run["result"]["parameters"])
        )

    @property
    def base_model(self) -> str | None:
        """The source's repository on the hub; None where it is a folder."""
        return hub_id(str(self.run["source"]["path"]), self.run["source"].get("on_disk")) if self.run else None

    @property
    def source_name(self) -> str | None:
        """Hub id of the model that this one was made from, or its name."""
        return self.base_model or title_of(self.run["source"]) if self.run else None

    @property
    def tags(self) -> list[str]:
        return [MARK, "pruned"] if self.kind == "pruned" else [MARK]

    @property
    def summary(self) -> str:
        """One sentence: what it is and where it comes from."""
        if self.run is None or self.kind is None:
            return f"{format_count(self.parameters)} parameters, exported with efficientllm"
        source, tokens = format_count(self.run["source"]["parameters"]), format_count(self.run["tokens"])
        made = f"{_SUMMARIES[self.kind]} {self.source_name} ({source})"
        return f"{format_count(self.parameters)} parameters, {made} over {tokens} tokens with efficientllm"

    @cached_property
    def recipe(self) -> Any:
        return yaml.safe_load(str((self.run or {}).get("recipe", "")))

    @property
    def on_disk(self) -> Any:
        return self.run["source"].get("on_disk") if self.run else None

    def metadata(self, gguf: GGUF | None = None) -> str:
        """The block that the hub reads, in YAML."""
        results = [
            EvalResult("text-generation", task, task, figure.metric, figure.value)
            for task, figure in measured(self.evaluation)
        ]
        return str(
            ModelCardData(
                library_name="gguf" if gguf else "transformers",
                pipeline_tag="text-generation",
                tags=[*self.tags, *(["gguf"] if gguf else [])],
                base_model=self.base_model,
                license=self.licence,
                datasets=datasets_of(self.recipe, self.on_disk) or None,
                model_name=self.title if results else None,
                eval_results=results or None,
            ).to_yaml()
        )

    def text(self, gguf: GGUF | None = None) -> str:
        """The whole card. Absolute paths are shown by their last component: the card is published, the machine's
        folders are not."""
        run = self.run or {}
        recipe = without_absolute_paths(str(run.get("recipe", ""))).strip("\n")
        losses = [run[model].get("validation_loss") for model in ("source", "result")] if run else []
        return rendered(
            "model_card.md",
            card=self,
            gguf=gguf,
            run=run,
            widths=WIDTH_LABELS | EXPERT_LABELS,
            perplexities=[_perplexity(loss) for loss in losses],
            way=evaluation_way(self.evaluation),
            measured=markdown(measured_rows(self.evaluation)),
            duration=_duration(run.get("seconds", 0.0)),
            data=described_data(self.recipe, self.on_disk),
            recipe=recipe,
            fence="`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0)),  # longer than any in it
            comparison=_comparison(run["source"], run["result"]) if run else "",
            format_count=format_count,
            number=_number,
        )


def write_model_card(folder: Path | str, facts: Mapping[str, Any]) -> Path:
    """Writes README.md into `folder` from the facts of summary.json and returns its path."""
    path = Path(folder) / README
    card = Card(facts["result"]["parameters"], facts, evaluation=facts.get("evaluation"))
    write_atomically(path, card.text().encode())
    return path


def metadata_of(file: Path) -> dict[str, Any]:
    """The metadata of a card that somebody else may have written; nothing where it has none that can be read."""
    try:
        return metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def license_of(folder: Path | str) -> str | None:
    """The licence that a model folder's own README.md states; None where it states none."""
    found = metadata_of(Path(folder) / README).get("license")
    return found if isinstance(found, str) else None


def _perplexity(loss: float | None) -> float | None:
    """Of a loss in nats; what is not known, or not finite, stays so."""
    if loss is None or not math.isfinite(loss):
        return loss
    return math.exp(min(loss, 700.0))  # beyond it a double overflows


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not measured" if value is None else "not finite"
    return f"{value:.4g}" if value >= 1000 else f"{value:.3f}"


def _comparison(source: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """In bits per byte where the two do not have the same tokens."""
    key, unit, rows = "validation_loss", "nats per token", ""
    if "vocabulary" in source or "vocabulary" in result:
        key, unit, rows = "validation_bits_per_byte", "bits per byte", ", each on rows of its own tokens"
        if not (source.keys() & result.keys() >= {key, "vocabulary"}):
            return "It may have other tokens than the source, so that their losses do not compare."
    before, after = source.get(key), result.get(key)
    if before is None or after is None:
        return "No validation text was given, so nothing is known of its quality."
    if not math.isfinite(after - before):
        return "Its loss is not a finite number: the run diverged, do not use it."
    way = "worse" if after > before else "better"
    return f"On the validation text it is {abs(after - before):.3f} {unit} {way} than the source{rows}."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
