"""The report as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from efficientllm.reporting.bench_table import bench_parts
from efficientllm.reporting.evaluation_table import evaluation_way, measured_rows
from efficientllm.reporting.run_record import RunRecord
from efficientllm.reporting.tables import WIDTH_LABELS, flops_sentence, rows_of
from efficientllm.reporting.templates import rendered
from efficientllm.sizes import format_count


def page(runs: Sequence[RunRecord], figures: Mapping[str, tuple[str, str]], notes: Sequence[str] = ()) -> str:
    """HTML of one or several runs. figures: id -> (caption, inline SVG). notes: sentences about the page as a whole."""
    return rendered(
        "report.html",
        title=" and ".join(run.name for run in runs),
        notes=[*(f"{run.name}: {note}" for run in runs for note in run.notes), *notes],
        models=rows_of(row for run in runs for row in _models(run)),
        costs=[f"{run.name}: {flops_sentence(parts)}" for run in runs if (parts := _flops_by_part(run))],
        figures=figures,
        runs=[_sections(run) for run in runs],
    )


def _models(run: RunRecord) -> Iterator[dict[str, str]]:
    """The rows of source and result."""
    if run.source:
        yield _model(f"{run.name}: source", run.source)
    last = run.metrics[-1] if run.metrics else {}
    facts = (run.summary or {}).get("result")
    if facts is None and "widths" in last:
        seen = [line for line in run.metrics if line.get("validation_loss") is not None]
        facts = {"parameters": last.get("live_parameters"), "widths": last["widths"]}
        facts |= {key: value for key, value in (seen[-1] if seen else {}).items() if key.startswith("validation_")}
    flops = last.get("flops")
    spent = {
        "tokens": format_count(last["tokens"]) if last else "-",
        "FLOPs": "-" if flops is None else f"{flops:.3g}",
        "hours": f"{sum(line['seconds'] for line in run.metrics if line.get('seconds')) / 3600:.2f}",
    }
    yield _model(f"{run.name}: {'result' if run.summary else 'so far'}", facts or {}) | spent


def _model(name: str, facts: Mapping[str, Any]) -> dict[str, str]:
    parameters, widths = facts.get("parameters"), dict(facts.get("widths", {}))
    if widths.get("experts"):
        widths["intermediate"] = f"{widths['experts']} x {widths['expert_intermediate']}"
    row = {"model": name, "parameters": "-" if parameters is None else format_count(parameters)}
    row |= {label: str(widths.get(key, "-")) for key, label in WIDTH_LABELS.items()}
    return row | {"validation loss": _loss(facts), "tokens": "-", "FLOPs": "-", "hours": "-"}


def _flops_by_part(run: RunRecord) -> dict[str, float] | None:
    """What the operations of a run were for, where it has counted that."""
    parts: dict[str, float] = (run.metrics[-1].get("flops_by_part") or {}) if run.metrics else {}
    return parts if all(isinstance(value, int | float) for value in parts.values()) else None


def _loss(facts: Mapping[str, Any]) -> str:
    """Where tokens may have fallen also in what compares, and of how many it is."""
    names = ("validation_loss", "validation_bits_per_byte", "vocabulary")
    loss, bits, tokens = (facts.get(name) for name in names)
    if loss is None:
        return "-"
    parts = [f"{bits:.4f} bits per byte"] if bits is not None else []
    parts += [f"{tokens:,} tokens"] if tokens is not None else []
    return f"{loss:.4f}" + (f" ({', '.join(parts)})" if parts else "")


def _sections(run: RunRecord) -> dict[str, Any]:
    """What else was measured of a run, for the template."""
    names = ("prompt", "source", "result")
    return {
        "name": run.name,
        "way": evaluation_way(run.evaluation),
        "tasks": measured_rows(run.evaluation),
        "bench": [_bench(result) for result in run.bench],
        "samples": rows_of({name: sample[name] or "(not at hand)" for name in names} for sample in run.samples),
        "recipe": run.recipe,
    }


def _bench(result: Mapping[str, Any]) -> dict[str, Any]:
    """What `efficientllm bench` has measured with this run's model in one backend."""
    shown: dict[str, Any] = {"backend": result["settings"]["backend"], "problem": "", "tables": [], "notes": []}
    try:
        facts, speeds, notes = bench_parts(result)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:  # a file of another version
        problem = f"this result of bench is not of the form that efficientllm writes and is left out ({error!r})"
        return shown | {"problem": problem}
    return shown | {"tables": [facts, speeds], "notes": notes}
