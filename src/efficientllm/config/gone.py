"""Keys that recipes once had: what to do instead, and what they were where they are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ABLATION = "docs/results/ablations.md resolves no difference"
# Of a value that went, prune.selection calibrated.
CALIBRATED = (
    "calibrated is gone, since a measured factor a type chose a worse shape (docs/results/smollm2.md): leave it out, "
    "with prune.saliency gate-fisher, whose nats compare types as they are, or with prune.target as widths"
)
_UNMEASURED = "leave it out: losses are not measured any more, types are compared by their scores"
_SOLVER = "leave it out: what docs/results/correction.md found best is always taken"


@dataclass(frozen=True)
class Gone:
    """instead: the rest of a sentence. was: values that mean what a recipe without the key means, as a run folder's
    config.yaml has them; None: all of them, since a run goes on under any."""

    instead: str
    was: tuple[Any, ...] | None = None


GONE: Mapping[str, Gone] = {
    "source_tokens": Gone("give it to `efficientllm compare` as --source-tokens"),
    "trust_remote_code": Gone(
        "leave it out: code that comes with a model is never run; transformers has every family that can be pruned",
        (False,),
    ),
    "data.text_column": Gone(
        "name the column in each source, such as data.train={path: a.parquet, text_column: content}", ("text",)
    ),
    "data.validation_fraction": Gone("write the share as data.validation, such as data.validation=1%", ("0.5%",)),
    "data.train[].name": Gone("write it into the path, such as org/data:name:split", ()),
    "data.train[].split": Gone(
        "write it into the path, such as org/data:name:split, or name the folder of one split", ()
    ),
    "train.eps": Gone("leave it out: it is Adam's own, 1e-8", (1e-8,)),
    "prune.latency_on": Gone(
        "leave it out: the first lines of a run and of `efficientllm plan` say what the table was measured on",
    ),
    "prune.calibration_batch": Gone(_UNMEASURED),
    "prune.calibration_batches": Gone("leave it out: one-shot takes its scores from eight batches", (8,)),
    "prune.calibration_tokens": Gone(_UNMEASURED),
    "prune.order": Gone("set prune.selection to the path, such as prune.selection=ffn-first", ("saliency",)),
    "prune.lr": Gone(f"leave it out: the rate is the same while pruning ({_ABLATION})", ("100%",)),
    "prune.ema": Gone("leave it out: a look counts half once prune.bound has fallen since", (0.5,)),
    "prune.correction_tokens": Gone(
        "leave it out: eight tokens for each input of the widest layer are taken, since fewer would be fitted rather "
        "than learnt from; where memory is short, set prune.correction=none",
        (),
    ),
    "prune.correction_damping": Gone(_SOLVER),
    "prune.correction_tolerance": Gone(_SOLVER),
    "prune.correction_iterations": Gone(_SOLVER),
    "prune.align.hidden": Gone("give one multiple for both widths, such as prune.align=64", ()),
    "prune.align.intermediate": Gone("give one multiple for both widths, such as prune.align=64", ()),
    "prune.compact_at": Gone("leave it out: tensors are cut to size once 4 % of their parameters are zero", ("4%",)),
    "distill.top_k": Gone(
        "set distill.samples, such as 50, since the largest logits alone teach a distribution that is too sharp", ()
    ),
    "distill.temperature": Gone("leave it out: distributions are compared as they are, at a temperature of 1", (1.0,)),
    "distill.chunk_tokens": Gone("leave it out: logits of 1,024 tokens stand in memory at once"),
    "run.log_every": Gone("leave it out: a run has a line of metrics for every step, or 10,000 lines spread over it"),
}


def without_gone(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that an older version has dumped, in today's keys: those that have a successor go on as that, and those
    that mean what their absence means today are left out."""
    found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in recipe.items()}
    data, prune = found.get("data"), found.get("prune")
    if isinstance(data, dict):
        _renew_data(data)
    if isinstance(prune, dict):
        if prune.get("order") not in (None, "saliency"):
            prune["selection"] = prune.pop("order")  # under a path, selection had no effect
        if isinstance(prune.get("align"), Mapping) and len({*prune["align"].values()}) == 1:
            (prune["align"],) = {*prune["align"].values()}
    return {
        name: {key: each for key, each in value.items() if not _dropped(f"{name}.{key}", each)}
        if isinstance(value, dict)
        else value
        for name, value in found.items()
        if not _dropped(name, value)
    }


def _renew_data(data: dict[str, Any]) -> None:
    """In place: name, split and text column of each source stand with the source, a share as validation."""
    parts = [part for part in ("train", "validation") if isinstance(data.get(part), list)]
    column = data.pop("text_column", None) if "train" in parts else None
    for part in parts:
        data[part] = [_renewed(each, column) for each in data[part]]
    if data.get("validation") is None and data.get("validation_fraction") is not None:
        data["validation"] = data.pop("validation_fraction")


def _dropped(key: str, value: Any) -> bool:
    gone = GONE.get(key)
    return gone is not None and (gone.was is None or value is None or value in gone.was)


def _renewed(source: Any, column: str | None) -> Any:
    """A source whose name and split stand beside its path, with all of them in the path; column: where it has none."""
    if isinstance(source, str):
        source = {"path": source}
    if not isinstance(source, Mapping):
        return source
    parts = [source.get("path"), source.get("name"), source.get("split")]
    while parts[-1] is None and len(parts) > 1:
        parts.pop()
    kept = {key: value for key, value in source.items() if key not in ("name", "split")}
    if column is not None and kept.get("text_column") is None:
        kept["text_column"] = column
    return kept | {"path": ":".join(part or "" for part in parts)}
