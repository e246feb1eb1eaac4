"""The Markdown of a measurement: what each model is, how fast it runs, and how the figures came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from efficientllm.reporting.tables import markdown, rows_of
from efficientllm.sizes import format_bytes, format_count


def bench_page(result: Mapping[str, Any]) -> str:
    """Two tables and a paragraph. result: what goes into the JSON file."""
    facts, speeds, notes = bench_parts(result)
    return "\n\n".join((markdown(facts), markdown(speeds), "\n".join(notes)))


def bench_parts(result: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Rows of what each model is and of how fast it runs, heads first; sentences."""
    return rows_of(_facts(result)), rows_of(_speeds(result)), list(_notes(result))


def _facts(result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    context = result["settings"]["prompt"] + result["settings"]["generate"]
    for model in result["models"]:
        facts = model["facts"]
        yield {
            "model": model["model"],
            "type": facts.get("type") or result["settings"]["dtype"],  # results of earlier versions name one for all
            "parameters": format_count(facts["parameters"]),
            "FLOPs/token, prefill": format_count(round(facts["prefill_flops"])),
            f"FLOPs/token, decode at {context}": format_count(facts["decode_flops"]),
            "weights": format_bytes(facts["weight_bytes"]),
            f"KV cache at {context}": format_bytes(facts["cache_bytes"]),
            "peak memory (above the empty process)": _memory(model["memory"]),
        }


def _memory(memory: Mapping[str, int | None]) -> str:
    device, peak, before = memory["device_peak"], memory["peak"], memory["before"]
    if device is not None:
        return f"{format_bytes(device)} of the GPU"
    if peak is None or before is None:
        return "not measurable here"
    return f"{format_bytes(peak)} ({format_bytes(peak - before)})"


def _speeds(result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for batch in map(str, result["settings"]["batches"]):
        for index, model in enumerate(result["models"]):
            found = model["batches"][batch]
            row = {
                "model": model["model"],
                "batch": batch,
                "time to first token, ms": _spread(found["time_to_first_token"], 1e3),
                "prefill, tokens/s": _spread(found["prefill_tokens_per_second"]),
                "decode, tokens/s": _spread(found["decode_tokens_per_second"]),
            }
            for phase in ("prefill", "decode") if len(result["models"]) > 1 else ():
                ratio = found[f"{phase}_ratio"]
                row[f"{phase}, x the first"] = (
                    "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) if index else "1"
                )
            yield row


def _spread(values: Mapping[str, float], scale: float = 1.0) -> str:
    median, low, high = (_number(scale * values[name]) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _number(value: float) -> str:
    """Three significant digits; all of them above 1000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name != "device")
    yield (
        f"{settings['backend']} on {settings['device']} ({machine['device']}), {settings['dtype']}, "
        f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}; {versions}. Prompts of "
        f"{settings['prompt']} tokens, {settings['generate']} generated."
    )
    order = "models in turn within each repeat, " if len(result["models"]) > 1 else ""
    yield (
        f"Median (lowest to highest) of {settings['repeats']} repeats after {settings['warm_ups']} warm-up; {order}"
        "each model in a process of its own, whose peak memory includes loading."
    )


def table_page(content: Mapping[str, Any], path: str) -> str:
    """The shapes held out of a latency table, measured and interpolated, and the table's error over them."""
    shape = "{layers} layers, hidden {hidden}, heads {heads}/{kv_heads}, FFN {intermediate}"
    checks = rows_of(
        {
            "held-out shape": shape.format(**check["widths"]),
            "measured, ms": _number(1e3 * check["seconds"]),
            "by the table, ms": _number(1e3 * check["predicted"]),
            "error": f"{check['error']:+.1%}",
        }
        for check in content["held_out"]
    )
    about = content["measured_on"]
    notes = (
        f"{path}: {len(content['seconds'])} shapes, prompt {about['prompt']}, {about['generate']} generated, batch "
        f"{about['batch']}, {about['dtype']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''} on "
        f"{about['machine']['device']}. Median of {content['repeats']} turns; a turn is the fastest of "
        f"{content['in_a_row']} sequences, as a ratio to the source's among them. The ratios of a shape range over "
        f"{content['median_range']:.0%} of their median (median shape)."
    )
    if not checks:
        return f"{notes}\n\nNo shape lies between those of the grid: its error is not known."
    error = f"Median error on shapes held out: {content['median_error']:.1%} (worst {content['worst_error']:.1%})."
    return "\n\n".join((markdown(checks), notes, error))
