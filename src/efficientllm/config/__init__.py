"""Recipes: what a run is to do, read from YAML, typed, and refused in one clear sentence where something is off."""

from efficientllm.config.prune import AlignConfig, CostTarget, FloorsConfig, PruneConfig, WidthTarget
from efficientllm.config.reading import dump_recipe, load_recipe
from efficientllm.config.sections import (
    DataConfig,
    DataSource,
    DistillConfig,
    DistributedConfig,
    Recipe,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "AlignConfig",
    "CostTarget",
    "DataConfig",
    "DataSource",
    "DistillConfig",
    "DistributedConfig",
    "FloorsConfig",
    "PruneConfig",
    "Recipe",
    "RunConfig",
    "TrainConfig",
    "WidthTarget",
    "dump_recipe",
    "load_recipe",
]
