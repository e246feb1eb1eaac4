"""Where a recipe comes to rest: one frozen plan, of it and of its source's config, that a run, `efficientllm plan` and
comparisons take."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from efficientllm.config import Recipe
from efficientllm.errors import UsageError
from efficientllm.models.experts import balance_of
from efficientllm.models.rotation import obstacle
from efficientllm.models.space import space_of
from efficientllm.pruning.groups import Space
from efficientllm.training.advisories import advisories_of
from efficientllm.training.passes import CORRECTION_TOKENS
from efficientllm.training.planning import pruning_plan
from efficientllm.training.state import PruningPlan
from efficientllm.training.validation_pace import ValidationPace, validation_pace


@dataclass(frozen=True)
class RunPlan:
    """A recipe at rest: all that follows from it and from the config of its source, before a file of either is read.

    source: the source's config; space: its shape. length: tokens of a row. batch_rows: rows of a step, all processes
    together; steps: of the whole run. pruning: None where nothing is pruned. advisories: what a run says of it before
    it starts, a line each. turned_by: rows whose principal components the stem is turned into before the first step; 0
    where it stays as it is.
    """

    recipe: Recipe
    source: PretrainedConfig
    space: Space
    length: int
    batch_rows: int
    steps: int
    pruning: PruningPlan | None
    pace: ValidationPace
    advisories: tuple[str, ...]
    turned_by: int = 0

    @property
    def batch_tokens(self) -> int:
        return self.batch_rows * self.length

    @property
    def tokens(self) -> int:
        """Of the whole run, which ends with a whole batch."""
        return self.steps * self.batch_tokens

    @property
    def outline(self) -> str:
        """What is about to run: steps, rows, peak rate, and over which tokens it prunes."""
        recipe = self.recipe
        said = f"{self.steps:,} steps of {self.batch_tokens:,} tokens ({self.batch_rows:,} rows of {self.length:,})"
        said += f" at a peak rate of {recipe.train.lr:g}"
        if recipe.prune is None:
            return said
        if recipe.prune.mode != "loop":
            return f"{said}, pruned at token {recipe.pruning_starts:,}"
        until = "on" if recipe.prune.every else f"to {recipe.pruning_ends:,}"
        return f"{said}, pruned from token {recipe.pruning_starts:,} {until}"


def run_plan(recipe: Recipe, source: PretrainedConfig) -> RunPlan:
    """The plan of a recipe for a source model with this config. Raises UsageError for what cannot be run on it."""
    space, length = space_of(source), recipe.data.sequence_length
    pruning = pruning_plan(recipe, source)
    pace = validation_pace(recipe, space, pruning)
    if length > source.max_position_embeddings:
        raise UsageError(
            f"data.sequence_length {length} is more than the {source.max_position_embeddings} positions that the "
            f"source was built for; set it to {source.max_position_embeddings} or less"
        )
    if recipe.train.compile and balance_of(source):
        raise UsageError(
            "the source's config asks for the load-balancing loss (output_router_logits), which compiled layers do not "
            "show: set train.compile to false, or output_router_logits to false in its config.json"
        )
    return RunPlan(
        recipe,
        source,
        space,
        length,
        recipe.train.batch_rows(length),
        recipe.train.steps(length),
        pruning,
        pace,
        (*advisories_of(recipe, pruning), *([pace.said] if pace.said else [])),
        _turned_by(recipe, source, space),
    )


def _turned_by(recipe: Recipe, source: PretrainedConfig, space: Space) -> int:
    """Rows for the components of prune.rotate: CORRECTION_TOKENS tokens for each residual channel."""
    fresh = recipe.init == "pretrained" and recipe.resume is None
    if recipe.prune is None or recipe.prune.rotate == "off" or not fresh or obstacle(source):
        return 0
    return -(-CORRECTION_TOKENS * space.widths.hidden // recipe.data.sequence_length)
