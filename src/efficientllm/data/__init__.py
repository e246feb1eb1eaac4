"""What is read becomes memory-mapped rows of tokens, once; the batch of a step is a function of seed and step."""
