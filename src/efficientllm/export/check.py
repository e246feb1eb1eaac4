"""An export held against transformers in each runtime that is here, in a fresh process: tokens and probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from efficientllm.errors import UsageError
from efficientllm.export.weights import read_config

VLLM_PYTHON = "EFFICIENTLLM_VLLM_PYTHON"  # an interpreter that has vLLM, whose torch and transformers are seldom ours
# Largest difference of a log-probability, as a share of the largest one, that rounding the weights may make.
ROUNDING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
# The same weights in another runtime; another order of sums made 2e-6 of it in the shapes of the tests.
ANOTHER_RUNTIME = 1e-4
# llama.cpp, which also rounds what it multiplies: with f16 to f16, with quantised weights to 8 bits. Results of
# SmolLM2-135M differ by 3e-2 and 5e-2 in q8_0, and by 7e-7 and 5e-6 in f32.
GGUF = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
QUANTISED = 0.5  # types of 5 bits and less: what is computed wrongly differs by more than all of it
_ROWS, _LENGTH = 2, 64
_SCRIPT = Path(__file__).with_name("runtimes.py")

Answer = dict[str, Any]
Say = Callable[[str], None]


def check_hf(source: Path, exported: Path, dtype: str, say: Say) -> None:
    """Says a line for each runtime: transformers against the source, vLLM against transformers, both on `exported`.

    Raises UsageError where one refuses the folder, or computes something else than rounding to `dtype` explains.
    """
    request = request_for(source)
    reply = ask("transformers", sys.executable, [source, exported], request)
    if "error" in reply:
        raise UsageError(f"{exported} does not load in a fresh process: {reply['error']}")
    before, after = reply["answers"]
    wrong = [judge(f"transformers {reply['version']}", before, after, ROUNDING[dtype], dtype == "float32", say)]
    python = os.environ.get(VLLM_PYTHON) or (sys.executable if find_spec("vllm") else None)
    if python:
        reply = ask("vllm", python, [exported], request)
        wrong.append(report("vLLM", reply, after, ANOTHER_RUNTIME, True, say))
    else:
        say(f"vLLM: not tried, for it is not installed; {VLLM_PYTHON}=PYTHON names an interpreter that has it")
    _refuse(exported, wrong, f"rounding to {dtype}")


def check_gguf(source: Path, file: Path, kind: str, say: Say) -> None:
    """Says a line for llama.cpp on the file, against transformers on the folder that it was made from.

    Raises UsageError where it refuses the file, or computes something else than the type `kind` explains.
    """
    if not find_spec("llama_cpp"):
        raise UsageError('--check of a GGUF file needs llama.cpp: pip install "efficientllm[llamacpp]"')
    request = request_for(source)
    want = ask("transformers", sys.executable, [source], request)
    if "error" in want:
        raise UsageError(f"{source} does not load in a fresh process: {want['error']}")
    say(f"transformers {want['version']}: on {source}, what the file is held against")
    reply = ask("llama_cpp", sys.executable, [file], request)
    wrong = report("llama.cpp", reply, want["answers"][0], GGUF.get(kind, QUANTISED), kind == "f32", say)
    _refuse(file, [wrong], f"the type {kind}")


def request_for(folder: Path) -> dict[str, Any]:
    """Random tokens, the same ones for every runtime; a quarter of a row is a prompt, half as many are written."""
    config = read_config(folder)
    length = min(_LENGTH, config.max_position_embeddings - 1)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(config.vocab_size, (_ROWS, length), generator=generator).tolist()
    return {"texts": texts, "start": max(1, length // 4), "new": length // 2}


def ask(runtime: str, python: str, models: list[Path], request: dict[str, Any]) -> dict[str, Any]:
    """What runtimes.py answers in a process of that interpreter; its `error` also where the process died."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # packages of ours are not for it
    asked = json.dumps({"runtime": runtime, "models": [str(model) for model in models], **request})
    command = [python, "-P", str(_SCRIPT)]  # -P: our modules beside the script are none of its imports
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise UsageError(
            f"{python} does not start ({error}); set {VLLM_PYTHON} to an interpreter that has vLLM"
        ) from error
    if done.returncode == 0:
        reply: dict[str, Any] = json.loads(done.stdout)
        return reply
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"error": f"its process ended with code {done.returncode}: {last}"}


def report(name: str, reply: dict[str, Any], want: Answer, tolerance: float, exact: bool, say: Say) -> str | None:
    if "error" in reply:
        say(f"{name}: refused: {reply['error']}")
        return f"{name} refuses it ({reply['error']}); docs/export.md says what it takes"
    return judge(f"{name} {reply['version']}", want, reply["answers"][0], tolerance, exact, say)


def judge(name: str, want: Answer, got: Answer, tolerance: float, exact: bool, say: Say) -> str | None:
    """Says what differs; returns it where that is more than tolerated. exact: every token written must be the same."""
    before, after = torch.tensor(want["logprobs"]).double(), torch.tensor(got["logprobs"]).double()
    difference, largest = float((before - after).abs().max()), float(before.abs().max())
    same_top = (torch.tensor(want["top"]) == torch.tensor(got["top"])).double().mean()
    same = int((torch.tensor(want["greedy"]) == torch.tensor(got["greedy"])).sum())
    written = torch.tensor(want["greedy"]).numel()
    text = (
        f"{same} of {written} greedy tokens the same; log-probabilities differ by at most {difference:.2e} "
        f"({difference / max(largest, 1e-30):.1e} of the largest, {largest:.3g}), same most likely token at "
        f"{same_top:.1%} of {before.numel()} positions"
    )
    say(f"{name}: {text}")
    if difference <= tolerance * largest and (same == written or not exact):
        return None
    return f"in {name}, {text}"


def _refuse(path: Path, wrong: list[str | None], explained: str) -> None:
    for text in wrong:
        if text and " refuses it " in text:
            raise UsageError(f"{path}: {text}")
        if text:
            raise UsageError(f"{path} is not the model it was made from: {text}; {explained} explains less")
