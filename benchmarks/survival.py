"""Does a run survive SIGKILL at any moment? Kills it at random, starts it again, compares every byte of the result.

    python benchmarks/survival.py FOLDER [--kills 100] [--seed 0]

A small Llama on the demo's corpus is pruned to 40 % with compactions, checkpoints every 12 steps and two ladder
snapshots. One run is left alone; others are killed after a random time, half of the kills while a checkpoint or a
snapshot is being written, and started again by the same command until they end. Every file of their results (weights
of the model and of each ladder size, the training state of each snapshot) must equal that of the undisturbed run bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import yaml

from efficientllm.config import Recipe
from efficientllm.demo.story import DemoSize, prepare_corpus, stage_recipe, write_architecture
from efficientllm.jobs.prune import run

SIZE = DemoSize(
    vocabulary=512, hidden=64, layers=2, heads=2, intermediate=192, sequence_length=128, batch_tokens=512,
    validation_tokens=8_192,
)  # fmt: skip
STEPS = 96


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def recipe_of(folder: Path, name: str) -> Path:
    recipe = stage_recipe(folder, f"runs/{name}", folder / "source" / "model", STEPS * SIZE.batch_tokens, SIZE)
    recipe["train"] |= {"lr": 2e-3}
    recipe["run"] |= {
        "checkpoint_every": 12 * SIZE.batch_tokens,
        "validate_every": "50%",
        "report": False,
        "trackers": [],
    }
    recipe["prune"] = {"target": "40%", "ladder": ["70%", "55%"], "end": "60%"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "efficientllm", "prune", str(recipe)]
    # Another number of threads is other last bits; every child takes the same, whatever the shell says.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def writing(run_folder: Path) -> bool:
    """Whether a checkpoint, a snapshot or the result is half written at this moment."""
    return any(run_folder.glob("checkpoints/.partial*")) or any(run_folder.glob("**/.partial*"))


def phase(run_folder: Path) -> str:
    if writing(run_folder):
        return "while a checkpoint, snapshot or result was being written"
    if not (run_folder / "metrics.jsonl").is_file():
        return "before the first step"
    return "between or within steps"


def kill_once(recipe: Path, run_folder: Path, choose: random.Random, seconds: float) -> str | None:
    """Starts the run and kills it; the phase that it was in, or None where it ended first."""
    process = start(recipe)
    began, limit = time.monotonic(), choose.uniform(0.0, seconds)
    wants_writing = choose.random() < 0.5
    while process.poll() is None:
        now = time.monotonic() - began
        if (wants_writing and now > 0.3 * limit and writing(run_folder)) or now > (2 if wants_writing else 1) * limit:
            break
        time.sleep(0.0005)
    else:
        return None
    where = phase(run_folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return where


def differing_bytes(one: Path, other: Path) -> tuple[int, int]:
    """Bytes compared and bytes that differ, over all safetensors of results and ladder."""
    names = sorted(
        str(path.relative_to(other)) for part in ("model", "ladder") for path in (other / part).rglob("*.safetensors")
    )
    compared = different = 0
    for name in names:
        a, b = (one / name).read_bytes(), (other / name).read_bytes()
        compared += len(b)
        different += abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False)) if a != b else 0
    return compared, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, choose = arguments.folder, random.Random(arguments.seed)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start_model = write_architecture(folder, prepare_corpus(folder, SIZE, say), SIZE)
    source = stage_recipe(folder, "source", start_model, 40_000, SIZE) | {"init": "random"}
    run(Recipe.model_validate(source), say)
    began = time.monotonic()
    assert start(recipe_of(folder, "undisturbed")).wait() == 0
    seconds = time.monotonic() - began
    phases: Counter[str] = Counter()
    runs, bytes_compared, bytes_different, failures = 0, 0, 0, 0
    while sum(phases.values()) < arguments.kills:
        runs += 1
        name = f"killed-{arguments.seed}-{runs}"
        recipe, run_folder = recipe_of(folder, name), folder / "runs" / name
        for _ in range(25):  # then it is let through
            if sum(phases.values()) >= arguments.kills:
                break
            where = kill_once(recipe, run_folder, choose, seconds)
            if where is None:
                break
            phases[where] += 1
            say(f"kill {sum(phases.values())} of {arguments.kills}: {where}")
        if start(recipe).wait() != 0:
            failures += 1
            continue
        compared, different = differing_bytes(run_folder, folder / "runs" / "undisturbed")
        bytes_compared, bytes_different = bytes_compared + compared, bytes_different + different
    result = {
        "kills": sum(phases.values()),
        "phases": dict(phases),
        "runs": runs,
        "runs that did not end": failures,
        "bytes compared": bytes_compared,
        "bytes that differ": bytes_different,
        "seconds of an undisturbed run": round(seconds, 1),
    }
    print(json.dumps(result, indent=1))
    if not bytes_compared:
        say("error: nothing was compared, so nothing is shown")
    raise SystemExit(1 if failures or bytes_different or not bytes_compared else 0)


if __name__ == "__main__":
    main()
