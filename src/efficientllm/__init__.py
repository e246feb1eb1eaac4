"""Pruning-aware pretraining: turn a good language model into a better small one, in one run."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pruner", "PruningCallback", "__version__"]

if TYPE_CHECKING:
    from efficientllm.library import Pruner
    from efficientllm.trainer_callback import PruningCallback


def __getattr__(name: str) -> Any:
    """Public names on first use, so that the command line starts without loading transformers."""
    if name == "Pruner":
        from efficientllm.library import Pruner

        return Pruner
    if name == "PruningCallback":
        from efficientllm.trainer_callback import PruningCallback

        return PruningCallback
    raise AttributeError(f"module 'efficientllm' has no attribute '{name}'")
