"""The figures of benchmarks/gpu.py as a Markdown table, with the aims beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Aim of a row, by model, part and row; None stands for every model.
AIMS = {
    (None, "step", "event / plain"): "<= 1.02",
    (None, "step", "event / plain at 524,288 tokens a step"): "<= 1.02",
    (None, "compile", "compiled, event / compiled"): "<= 1.02",
    ("1.7B", "compile", "compiled"): ">= 50 % utilisation (H200)",
    (None, "trainer", "trainer / ours, compiled"): ">= 1.2",
    (None, "loop", "loop / ours, compiled"): ">= 1.2",
}


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines: the machine, then a row for every figure of every model."""
    found = results["machine"]
    yield f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}, Python {found['python']}"
    if found["matmul"]:
        yield f"bf16 matrix product of 8,192 x 8,192: {found['matmul'] / 1e12:.0f} TFLOP/s"
    if results["tiny"]:
        yield "toy models: these figures say that the benchmark runs, and nothing else"
    yield ""
    yield "| model | part | measured | figure | aim |"
    yield "| --- | --- | --- | --- | --- |"
    for model, parts in results["models"].items():
        for part, figures in parts.items():
            for name, value in _rows(part, figures):
                aim = AIMS.get((model, part, name)) or AIMS.get((None, part, name)) or ""
                yield f"| {model} | {part} | {name} | {value} | {aim} |"


def _rows(part: str, figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "left_out" in figures:
        yield "left out", figures["left_out"]
        return
    if part == "shape":
        yield "parameters", f"{figures['parameters']:,}"
        rows = f"{figures['rows']} rows of {figures['length']}, {figures['micro_batch']} at a time"
        yield "a step", f"{rows}, {figures['loss_auto']} loss"
        return
    for name, way in figures.get("ways", {}).items():
        yield name, _rate(way)
    for name, ratio in figures.get("ratios", {}).items():
        yield f"{name} / {figures['base']}", _spread(ratio)
    for name, ratio in figures.get("speedup", {}).items():
        yield f"{figures['base']} / {name}", _spread(ratio)
    if part == "step":
        yield "event / plain at 524,288 tokens a step", f"{figures['pruning_at_default_batch']:.4f} (computed)"
        for name, seconds in figures["event_seconds"].items():
            yield f"an event, {name}", f"{1000 * seconds:.1f} ms"
        apart = figures["agreement"]
        text = f"{apart['loss']:.1e} of the loss, {apart['gradient']:.1e} of the embedding's gradient"
        yield "chunked loss differs from plain by", text
    if part == "compile":
        yield "graphs compiled", str(figures["graphs"])
    if part == "compaction":
        yield "seconds", f"{figures['seconds']:.2f} ({figures['steps']:.2f} steps)"
        yield "peak memory", _memory(figures["peak_memory"])
        yield "parameters", " to ".join(f"{count:,}" for count in figures["parameters"])
    for name, shape in figures.get("shapes", {}).items():
        yield f"{name} shape", f"{shape['widths']}, {shape['parameters']:,} parameters"


def _rate(way: Mapping[str, Any]) -> str:
    share = "" if way["utilisation"] is None else f", {way['utilisation']:.1%} utilisation"
    memory = f", {_memory(way['peak_memory'])}" if way.get("peak_memory") else ""
    return f"{way['tokens_per_second']:,.0f} tokens/s{share}{memory}"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, mean {ratio['mean']:.3f})"


def _memory(count: int | None) -> str:
    return "not counted here" if count is None else f"{count / 2**30:.1f} GiB"
