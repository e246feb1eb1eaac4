"""Talk to a compact model in a terminal, by llama.cpp.

    pip install "efficientllm[llamacpp]"
    efficientllm export runs/mine --to gguf --type q8_0
    python examples/edge/chat.py runs/mine/gguf/mine-q8_0.gguf [--tokens 200] [--temperature 0.8]

A model with a chat template answers; one without (a base model) goes on with what you write. Lines can be piped in.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def answer(model: Any, said: list[dict[str, str]], options: dict[str, Any]) -> Iterator[str]:
    """The model's words as they come: in its chat format, or as a continuation of the last line."""
    if "tokenizer.chat_template" in model.metadata:
        for part in model.create_chat_completion(said, stream=True, **options):
            yield part["choices"][0]["delta"].get("content") or ""
    else:
        for part in model.create_completion(said[-1]["content"], stream=True, **options):
            yield part["choices"][0]["text"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    try:
        from llama_cpp import Llama
    except ImportError:
        print('error: this needs llama.cpp: pip install "efficientllm[llamacpp]"', file=sys.stderr)
        return 2
    if not arguments.file.is_file():
        print(f"error: {arguments.file} is no file; `efficientllm export RUN --to gguf` writes one", file=sys.stderr)
        return 2
    model = Llama(str(arguments.file), n_ctx=0, n_threads=arguments.threads, verbose=False)
    options = {"max_tokens": arguments.tokens, "temperature": arguments.temperature}
    said: list[dict[str, str]] = []
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip():
            continue
        said.append({"role": "user", "content": line})
        words = []
        for word in answer(model, said, options):
            words.append(word)
            print(word, end="", flush=True)
        print()
        said.append({"role": "assistant", "content": "".join(words)})


if __name__ == "__main__":
    raise SystemExit(main())
