"""The command that says what a run will need: plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from efficientllm.cli.app import Overrides, RecipeFile, app, one_sentence, say
from efficientllm.errors import UsageError

if TYPE_CHECKING:
    from efficientllm.planning.gpus import Gpu
    from efficientllm.planning.plan import Plan


@app.command()
@one_sentence()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="Such as h100-80gb; default: no hours, memory in fp32.")] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's peak that is reached.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What a recipe will cost, before anything is spent: shape, events, FLOPs, memory by part, hours, disk."""
    from efficientllm.config import load_recipe
    from efficientllm.models.loading import load_config
    from efficientllm.planning.gpus import gpu_named
    from efficientllm.planning.plan import plan_of

    loaded = load_recipe(recipe, overrides or [])
    machine = gpu_named(gpu) if gpu else None
    bf16 = loaded.train.precision == "bf16" or (machine is not None and loaded.train.precision == "auto")
    config = load_config(loaded.source, trust_remote_code=loaded.trust_remote_code)
    say("tracing the memory of one step; no weights are allocated")
    try:
        found = plan_of(loaded, config, bf16=bf16)
    except ValueError as error:
        raise UsageError(str(error)) from error
    hours = found.flops / (machine.flops * utilisation) / 3600 if machine else None
    if as_json:
        print(
            json.dumps(asdict(found) | {"hours": hours, "gpu": gpu, "utilisation": utilisation, "bf16": bf16}, indent=1)
        )
        return
    for name, value in _rows(found, machine, hours, utilisation, bf16=bf16):
        print(f"{name:<22}{value}")


def _goal(plan: Plan) -> str:
    from efficientllm.sizes import format_count

    size = f"{format_count(plan.target)} parameters"
    return f"{plan.reaches} at most, about {size}" if plan.reaches else f"{size} at most"


def _rows(plan: Plan, gpu: Gpu | None, hours: float | None, utilisation: float, *, bf16: bool) -> list[tuple[str, str]]:
    from efficientllm.sizes import format_bytes, format_count

    kind = "bf16 autocast" if bf16 else "fp32"
    before, pruning, after = (format_count(tokens) for tokens in plan.phases)
    memory = plan.memory
    rows = [
        ("source", f"{format_count(plan.parameters)} parameters: {plan.widths}"),
        ("result", f"{_goal(plan)}; in the source's proportions {plan.proportional}"),
        ("", "(saliency chooses widths of its own, of the same size)"),
        ("events, compactions", f"about {plan.events:,} and {plan.compactions:,}"),
        ("tokens", f"{before} before, {pruning} while, {after} after pruning; {plan.steps:,} steps of "
         f"{format_count(plan.batch_tokens)}"),
        ("FLOPs", f"{plan.flops:.3g} in all; {plan.step_flops:.3g} a step at full shape"),
        ("memory, weights", format_bytes(memory.weights)),
        ("memory, gradients", format_bytes(memory.gradients)),
        ("memory, AdamW", format_bytes(memory.optimizer)),
        ("memory, activations", f"{format_bytes(memory.activations)} (one micro-batch, {kind})"),
        ("memory, temporary", format_bytes(memory.temporary)),
        ("memory, in all", format_bytes(memory.total)),
        ("disk", f"{format_bytes(plan.checkpoint)} a checkpoint, "
         f"{format_bytes(plan.corpus)} for as many tokens as the run reads"),
    ]  # fmt: skip
    if gpu is not None and hours is not None:
        fits = memory.total <= 0.92 * gpu.memory
        mend = "" if fits else ": lower train.micro_batch or set train.gradient_checkpointing=true"
        rows.append((gpu.name, f"{'fits' if fits else 'does not fit'} in {format_bytes(gpu.memory)}{mend}"))
        rows.append(("hours", f"{hours:,.1f} at {utilisation:.0%} of {gpu.flops:.3g} FLOP/s ({gpu.sheet})"))
    return rows
