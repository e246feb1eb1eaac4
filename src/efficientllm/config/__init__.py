"""Recipes: what a run is to do, read from YAML, typed, and refused in one clear sentence where something is off."""

from efficientllm.config.data import DataConfig, DataSource
from efficientllm.config.prune import AlignConfig, FloorsConfig, LatencyOnConfig, PruneConfig
from efficientllm.config.reading import dump_recipe, load_recipe
from efficientllm.config.sections import DistillConfig, DistributedConfig, Recipe, RunConfig, TrainConfig
from efficientllm.config.targets import CostTarget, WidthTarget

__all__ = [
    "AlignConfig",
    "CostTarget",
    "DataConfig",
    "DataSource",
    "DistillConfig",
    "DistributedConfig",
    "FloorsConfig",
    "LatencyOnConfig",
    "PruneConfig",
    "Recipe",
    "RunConfig",
    "TrainConfig",
    "WidthTarget",
    "dump_recipe",
    "load_recipe",
]
