"""Recipes: what a run is to do, read from YAML, typed, and refused in one clear sentence where something is off."""

from efficientllm.config.data import DataConfig, DataSource
from efficientllm.config.fields import Trait
from efficientllm.config.gone import GONE, without_gone
from efficientllm.config.prune import FloorsConfig, PruneConfig
from efficientllm.config.reading import dump_recipe, effective_recipe, load_recipe
from efficientllm.config.sections import DistillConfig, DistributedConfig, Recipe, RunConfig
from efficientllm.config.targets import CostTarget, WidthTarget
from efficientllm.config.train import TrainConfig

__all__ = [
    "GONE",
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
    "Trait",
    "WidthTarget",
    "dump_recipe",
    "effective_recipe",
    "load_recipe",
    "without_gone",
]
