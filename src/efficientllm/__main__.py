"""`python -m efficientllm`, which is what torchrun starts."""

from efficientllm.cli import main

main()
