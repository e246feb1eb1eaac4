"""One training loop: with pruning it is pruning-aware pretraining, without it plain (continued) pretraining."""
