"""Models for elsewhere: a transformers folder in another dtype, a GGUF file for llama.cpp, an upload to the hub."""
