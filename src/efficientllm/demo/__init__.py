"""`efficientllm demo`: source, compact model and from-scratch control on text that every machine has."""
