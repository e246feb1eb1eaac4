"""Talk to a compact model in a terminal, by llama.cpp.

    pip install ".[llamacpp]"  # in a clone
    efficientllm export runs/mine --to gguf --type q8_0
    python examples/edge/chat.py runs/mine/gguf/mine-q8_0.gguf [--tokens 200] [--temperature 0.8] [--context 4096]

A model with a chat template answers; one without (a base model) goes on with what you write. Lines can be piped in.
Ctrl-C while it writes stops the answer, at the prompt the program. Where the context is full the oldest turns go.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Turns = list[dict[str, str]]


def answer(model: Any, said: Turns, options: dict[str, Any]) -> Iterator[str]:
    """The model's words as they come: in its chat format, or as a continuation of the last line."""
    if "tokenizer.chat_template" in model.metadata:
        for part in model.create_chat_completion(said, stream=True, **options):
            yield part["choices"][0]["delta"].get("content") or ""
    else:
        for part in model.create_completion(said[-1]["content"], stream=True, **options):
            yield part["choices"][0]["text"]


def fitting_answer(model: Any, said: Turns, options: dict[str, Any]) -> Iterator[str]:
    """As `answer`; drops the oldest turns, in place, until what is left fits in the context."""
    while True:
        words = answer(model, said, options)
        try:
            first = next(words, "")
        except ValueError:  # llama-cpp-python's, before the first word: more tokens than the context has
            if len(said) == 1:
                raise
            del said[:2]
            continue
        yield first
        yield from words
        return


def take_turn(model: Any, said: Turns, line: str, options: dict[str, Any]) -> None:
    """Prints the answer to a line and keeps both; a line that cannot be answered is not kept."""
    said.append({"role": "user", "content": line})
    words: list[str] = []
    try:
        for word in fitting_answer(model, said, options):
            words.append(word)
            print(word, end="", flush=True)
    except KeyboardInterrupt:  # the answer ends here, the conversation goes on
        pass
    except ValueError as error:
        print(f"error: {error}; write less, or raise --context", file=sys.stderr)
        said.pop()
        return
    print()
    said.append({"role": "assistant", "content": "".join(words)})


def load(file: Path, context: int, threads: int | None) -> Any:
    """The model with a context of so many tokens, or as many as it takes. Raises ValueError for a broken file."""
    from llama_cpp import Llama

    metadata = Llama(str(file), vocab_only=True, verbose=False).metadata
    most = int(metadata.get(f"{metadata.get('general.architecture')}.context_length", context))
    return Llama(str(file), n_ctx=min(context, most), n_threads=threads, verbose=False)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--context", type=int, default=4096, help="most tokens of a conversation; memory grows with it")
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    if not arguments.file.is_file():
        print(f"error: {arguments.file} is no file; `efficientllm export RUN --to gguf` writes one", file=sys.stderr)
        return 2
    try:
        model = load(arguments.file, arguments.context, arguments.threads)
    except ImportError:
        print('error: this needs llama.cpp: pip install "efficientllm[llamacpp]"', file=sys.stderr)
        return 2
    except ValueError:
        print(f"error: {arguments.file} is no GGUF file that llama.cpp loads; export it anew", file=sys.stderr)
        return 2
    options = {"max_tokens": arguments.tokens, "temperature": arguments.temperature}
    said: Turns = []
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if line.strip():
            take_turn(model, said, line, options)


if __name__ == "__main__":
    raise SystemExit(main())
