"""Several processes that train one model: ranks, layout of the weights, launch, and what happens when one fails."""
