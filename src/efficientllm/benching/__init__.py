"""How fast and how large a finished model is where it is to run: latency, tokens/s, memory, FLOPs."""
