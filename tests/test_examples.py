"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World, need_llamacpp, tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAT = EXAMPLES / "edge" / "chat.py"


def call(path: Path, *argv: str | Path, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(path), *map(str, argv)]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_runs(
    path: Path,
    tmp_path: Path,
    small_corpus: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert "parameters" in out
    assert path.stem != "source_to_gguf" or "same most likely token at" in out  # the check in a fresh process


def test_one_argument_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(EXAMPLES / "source_to_gguf.py")
    monkeypatch.setattr(sys, "argv", [path, "text.txt"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    assert stop.value.code == "error: name a source and a text file, or neither: source_to_gguf.py [SOURCE TEXT_FILE]"


@pytest.fixture
def chat() -> Any:
    specification = importlib.util.spec_from_file_location("chat", CHAT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def speaker(room: int, *words: str | BaseException) -> Any:
    """A model that takes `room` turns and then says the words, or raises them."""

    def create(said: list[dict[str, str]], stream: bool, **options: Any) -> Iterator[dict[str, Any]]:
        if len(said) > room:
            raise ValueError("Requested tokens (9) exceed context window of 8")
        for word in words:
            if isinstance(word, BaseException):
                raise word
            yield {"choices": [{"delta": {"content": word}}]}

    return SimpleNamespace(metadata={"tokenizer.chat_template": "x"}, create_chat_completion=create)


def test_a_full_context_drops_the_oldest_turns(chat: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[dict[str, str]] = []
    for line in ("one", "two", "three"):
        chat.take_turn(speaker(3, "yes"), said, line, {})
    assert [turn["content"] for turn in said] == ["two", "yes", "three", "yes"]
    said.clear()
    chat.take_turn(speaker(0, "yes"), said, "too long", {})
    assert said == []
    assert "raise --context" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_not_the_conversation(chat: Any, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[dict[str, str]] = []
    chat.take_turn(speaker(9, "once ", KeyboardInterrupt()), said, "tell me", {})
    assert [turn["content"] for turn in said] == ["tell me", "once "]
    assert capsys.readouterr().out == "once \n"


def test_the_chat_speaks_with_a_real_file(world: World, tmp_path: Path) -> None:
    need_llamacpp()
    from efficientllm.export.gguf import GGUFRequest, export_gguf
    from efficientllm.export.subject import subject_of

    folder = tmp_path / "source"
    tiny_model("llama-gqa", vocab_size=300).save_pretrained(folder)
    for file in (world.folder / "tokenizer").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    path = export_gguf(GGUFRequest(subject_of(folder), "f16", tmp_path / "m.gguf"), lambda note: None)
    done = call(CHAT, path, "--tokens", "5", cwd=tmp_path, text="the model\n\nlearns\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    path.write_bytes(b"no model")
    done = call(CHAT, path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {path} is no GGUF file that llama.cpp loads; export it anew"
