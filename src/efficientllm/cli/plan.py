"""Commands before a run: what a recipe may say (keys), and what it will cost (plan)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from efficientllm.cli.app import Overrides, RecipeFile, app, one_sentence, say
from efficientllm.errors import UsageError
from efficientllm.sizes import format_bytes, format_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from efficientllm.config import Recipe
    from efficientllm.planning.gpus import Gpu
    from efficientllm.planning.memory import StepMemory
    from efficientllm.planning.plan import Estimate
    from efficientllm.planning.sharding import Sharding


@app.command()
@one_sentence()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="One section, such as prune, or one key; default: all.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/recipe.md has it.")] = False,
) -> None:
    """List the keys of a recipe with their defaults and meanings."""
    from efficientllm.config import GONE
    from efficientllm.config.reference import recipe_keys
    from efficientllm.reporting.tables import keys_page, print_keys

    found = list(recipe_keys())
    if section is not None:
        known = sorted({key.name.split(".")[0] for key in found})
        found = [key for key in found if (key.name + ".").replace("[]", "").startswith(f"{section}.")]
        if not found:
            raise UsageError(f"{section} is neither a section nor a key of a recipe; sections are {', '.join(known)}")
    if markdown:
        print(keys_page(found, {key: gone.instead for key, gone in GONE.items()}), end="")
    else:
        print_keys(found)


@app.command()
@one_sentence()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="Such as h100-80gb; default: no hours, memory in fp32.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of them, one process each.")] = 1,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's peak that is reached.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """What a recipe will cost, before anything is spent: shape, events, FLOPs, memory by part, hours, disk."""
    from efficientllm.config import load_recipe
    from efficientllm.models.loading import load_config
    from efficientllm.planning.gpus import gpu_named
    from efficientllm.planning.plan import estimate_of
    from efficientllm.pruning.widths import Widths
    from efficientllm.training.run_plan import run_plan

    loaded = load_recipe(recipe, overrides or [])
    machine = gpu_named(gpu) if gpu else None
    bf16 = loaded.train.precision == "bf16" or (machine is not None and loaded.train.precision == "auto")
    config = load_config(loaded.source)
    say("tracing the memory of one step; no weights are allocated")
    teacher = loaded.distill.teacher if loaded.distill else None
    taught = load_config(teacher) if teacher else None
    found = estimate_of(run_plan(loaded, config), bf16=bf16, gpu=machine is not None, teacher=taught)
    for note in found.notes:
        say(note)
    spread = _sharding(loaded, found, config, machine, gpus, per_node, bf16=bf16)
    hours = (found.flops + found.validation_flops) / (machine.peak(bf16=bf16) * utilisation) / 3600 if machine else None
    host = 4 * found.parameters * min(gpus, per_node)
    if as_json:
        more: dict[str, object] = {
            "gpu_hours": hours,
            "gpu": gpu,
            "gpus": gpus,
            "utilisation": utilisation,
            "bf16": bf16,
            "host_memory": host,
        }
        more |= {"hours": hours / gpus if hours is not None else None, "sharding": asdict(spread) if spread else None}
        print(json.dumps(asdict(found) | more, indent=1, default=Widths.record))
        return
    rows = _rows(found, spread.memory if spread else found.memory, bf16=bf16)
    rows.append(("main memory, a node", f"{format_bytes(host)} while {min(gpus, per_node)} x the source is loaded"))
    if spread:
        rows += _sharding_rows(spread, gpus)
    if machine is not None and hours is not None:
        total = spread.total if spread else found.memory.total
        rows.append((machine.name, _fit(machine, total, found.memory, loaded)))
        rows.append(("hours", _hours(machine, hours, gpus, utilisation, bf16=bf16)))
    for name, value in rows:
        print(f"{name:<22}{value}")


def _sharding(
    recipe: Recipe, plan: Estimate, config: PretrainedConfig, gpu: Gpu | None, gpus: int, per_node: int, *, bf16: bool
) -> Sharding | None:
    from efficientllm.models.space import space_of
    from efficientllm.planning.sharding import sharding_of

    if gpus == 1:
        return None
    if gpu is None:
        raise UsageError("--gpus needs to know which: add --gpu, such as h100-80gb")
    rows = plan.batch_tokens // recipe.data.sequence_length
    if rows % gpus:
        raise UsageError(
            f"a step of {rows} rows (train.batch_tokens) does not divide over {gpus} GPUs; make it a multiple of "
            f"{gpus}, or plan for another number"
        )
    return sharding_of(
        space_of(config),
        plan.memory,
        recipe.distributed,
        gpus=gpus,
        per_node=per_node,
        device_memory=int(gpu.memory),
        micro_batches=-(-rows // gpus // recipe.train.micro_batch),
        bf16=bf16,
    )


def _sharding_rows(spread: Sharding, gpus: int) -> list[tuple[str, str]]:
    pieces = "whole" if spread.shards == 1 else f"in {spread.shards} shards"
    copies = "1 copy" if spread.replicas == 1 else f"{spread.replicas} copies"
    return [
        ("memory, gathered", f"{format_bytes(spread.gathered)} of weights while they compute"),
        ("memory, scattered", f"{format_bytes(spread.scattered)} of gradients on their way to their shards"),
        ("memory, each GPU", format_bytes(spread.total)),
        ("sharding", f"{copies}, each weight {pieces}: {spread.why}"),
        ("communication", f"each of {gpus} GPUs sends {format_bytes(spread.sent)} a step at full shape"),
    ]


def _fit(gpu: Gpu, total: float, step: StepMemory, recipe: Recipe) -> str:
    """Whether it fits, and if not what would: activations and temporaries grow with the rows of a micro-batch."""
    room = 0.92 * gpu.memory
    if total <= room:
        return f"fits in {format_bytes(gpu.memory)}"
    rows = min(recipe.train.micro_batch, recipe.train.batch_rows(recipe.data.sequence_length))
    moving = step.activations + step.temporary
    fitting = int(rows * (room - total + moving) / moving)
    if fitting >= 1:
        mend = f"train.micro_batch={fitting} would by a linear estimate; or set train.gradient_checkpointing=true"
    else:
        mend = "not with train.micro_batch=1 either, by a linear estimate: shard it over more GPUs, or set " + (
            "distributed.shard" if recipe.train.gradient_checkpointing else "train.gradient_checkpointing=true"
        )
    return f"does not fit in {format_bytes(gpu.memory)}: {mend}"


def _hours(gpu: Gpu, hours: float, gpus: int, utilisation: float, *, bf16: bool) -> str:
    together = f" ({hours:,.0f} GPU-hours)" if gpus > 1 else ""
    peak = f"{utilisation:.0%} of {gpu.peak(bf16=bf16):.3g} FLOP/s in {'bf16' if bf16 else 'fp32'} ({gpu.sheet})"
    return f"{hours / gpus:,.1f}{together} at {peak}"


def _goal(plan: Estimate) -> str:
    size = f"{format_count(plan.target)} parameters"
    return f"{plan.reaches} at most, about {size}" if plan.reaches else f"{size} at most"


def _modes(plan: Estimate) -> str:
    """FLOPs of each, and which one to take: docs/results/plan.md has the evidence."""
    spent = ", ".join(f"{mode} {flops:.3g}" for mode, flops in plan.flops_by_mode.items())
    return spent + (f" (lowest in loss or level wherever compared: {plan.suits})" if plan.suits else "")


def _rows(plan: Estimate, memory: StepMemory, *, bf16: bool) -> list[tuple[str, str]]:
    from efficientllm.reporting.tables import flops_sentence

    kind = "bf16 autocast" if bf16 else "fp32"
    before, pruning, after = (format_count(tokens) for tokens in plan.phases)
    return [
        ("source", f"{format_count(plan.parameters)} parameters: {plan.widths}"),
        ("result", f"{_goal(plan)}; in the source's proportions {plan.proportional}"),
        ("", "(saliency chooses widths of its own, of the same size)"),
        ("events, compactions", f"about {plan.events:,} and {plan.compactions:,}; "
         f"the gradient anew {plan.refreshes:,} times"),
        ("tokens", f"{before} before, {pruning} while, {after} after pruning; {plan.steps:,} steps of "
         f"{format_count(plan.batch_tokens)}"),
        ("FLOPs", f"{flops_sentence(asdict(plan.flops_by_part)).replace('FLOPs ', '')}; "
         f"{plan.step_flops:.3g} a step at full shape; validation takes {plan.validation_flops:.3g} more"),
        *([("", f"at the same tokens by prune.mode: {_modes(plan)}")] if plan.flops_by_mode else []),
        ("memory, weights", format_bytes(memory.weights)),
        ("memory, gradients", format_bytes(memory.gradients)),
        ("memory, AdamW", format_bytes(memory.optimizer)),
        ("memory, activations", f"{format_bytes(memory.activations)} (one micro-batch, {kind})"),
        ("memory, temporary", format_bytes(memory.temporary)),
        *([("memory, teacher", format_bytes(memory.teacher))] if memory.teacher else []),
        *([("memory, inputs", f"{format_bytes(memory.inputs)} (for corrections)")] if memory.inputs else []),
        ("memory, in all", format_bytes(memory.total)),
        ("disk", f"{format_bytes(plan.checkpoint)} a checkpoint, {plan.checkpoints} of them while one is written; "
         f"{format_bytes(plan.corpus)} for as many tokens as the run reads, and all of the text is tokenised"),
        *([("disk, teacher", f"{format_bytes(plan.draws)} of draws")] if plan.draws else []),
    ]  # fmt: skip
