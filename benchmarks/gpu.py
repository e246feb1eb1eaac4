"""What training and pruning cost on a GPU, in one command that needs torch, transformers and this repository.

    python benchmarks/gpu.py [--json FILE] [--only PART ...] [--models 1.7B 360M] [--micro-batch ROWS] [--seconds 460]
    python benchmarks/gpu.py --tiny       # every part on toy models, also on a CPU: shows that it runs, no more

Models are built from configs with fresh weights, batches are random tokens: no hub, no data, no recipe. What is
compared takes its steps in turn in one process; ratios are taken within a round, and their median is quoted. Parts run
in the order below, each within a time of its own; what does not fit, or fails, is left out with its reason, and the
JSON is written after every part.

    machine      the device, and what a large bf16 matrix product reaches on it
    step         our loop: plain; with saliency; with an event; with an event and correction; plain and chunked loss
    compile      the same with torch.compile: plain, with an event
    trainer      transformers' Trainer on the same model and batch, beside our loop, eager and compiled
    loop         a hand-written loop as in transformers' examples, likewise
    compaction   cutting out the least salient 4 % of the parameters
    widths       a final shape with aligned widths against one of as many parameters with odd ones
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))  # nothing has to be installed

import torch
import transformers
from gpu_parts import Bench, LeftOut
from gpu_report import table
from gpu_shapes import shapes_of

from efficientllm.errors import UsageError
from efficientllm.planning.gpus import GPUS, gpu_named

SECONDS = {"step": 110, "compile": 110, "trainer": 80, "loop": 60, "compaction": 40, "widths": 60}  # at most
LEAST = 12.0  # seconds under which no part is begun


class Clock:
    """What is left of the time that the whole command may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Raises LeftOut inside the block when its time, or all of it, is over. Main thread only."""
        allowed = min(seconds, self.left())
        if allowed < LEAST:
            raise LeftOut(f"no time: {max(0.0, allowed):.0f} s are left of what --seconds gives")

        def stop(*_: Any) -> None:
            raise LeftOut(f"not done after {allowed:.0f} s, all that it was given")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, allowed)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)


def machine(device: torch.device, gpu: str | None) -> dict[str, Any]:
    """Names, versions, the peak that utilisation is counted against, and the rate of a large matrix product."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": importlib.util.find_spec("accelerate") is not None,
    }
    if device.type != "cuda":
        return found | {"device": f"{platform.machine()}, {os.cpu_count()} cores", "peak": None, "matmul": None}
    properties = torch.cuda.get_device_properties(device)
    plain = properties.name.lower().replace(" ", "")
    known = [name for name in GPUS if name.partition("-")[0] in plain]
    name = gpu or max(known, key=len, default=None)
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        left @ left
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    rate = 2 * 8192**3 / sorted(times)[len(times) // 2]
    memory = properties.total_memory
    peak = gpu_named(name).flops if name else None
    return found | {"device": properties.name, "memory": memory, "sheet": name, "peak": peak, "matmul": rate}


def write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(path)


def attempt(clock: Clock, seconds: float, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part's figures with the seconds that it took, or why there are none."""
    began = time.monotonic()
    try:
        with clock.at_most(seconds):
            found = part()
    except LeftOut as reason:
        found = {"left_out": str(reason)}
    except torch.OutOfMemoryError as error:
        found = {"left_out": f"out of memory: {str(error).partition('. ')[0]}; lower --micro-batch"}
    except Exception as error:  # a part that fails must not take the others' figures with it
        found = {"left_out": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    return found | {"took": round(time.monotonic() - began, 1)}


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    clock = Clock(arguments.seconds)
    results: dict[str, Any] = {"machine": machine(device, arguments.gpu), "tiny": arguments.tiny, "models": {}}
    for shape in shapes_of(arguments.models, device, tiny=arguments.tiny, micro=arguments.micro_batch):
        bench = Bench(shape, device, peak=results["machine"]["peak"], tiny=arguments.tiny)
        found = results["models"][shape.name] = {"shape": bench.facts()}
        for name in (each for each in SECONDS if each in arguments.only):
            print(f"{shape.name}: {name}", file=sys.stderr, flush=True)
            bench.deadline = time.monotonic() + min(SECONDS[name], clock.left())
            found[name] = attempt(clock, SECONDS[name], getattr(bench, name))
            if "left_out" in found[name]:
                print(f"  left out: {found[name]['left_out']}", file=sys.stderr, flush=True)
                bench.drop()  # a step may have been cut off in the middle
            gc.collect()
            torch.cuda.empty_cache()
            write(arguments.json, results)
        bench.drop()
    return results


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Raises UsageError for what cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures, written after every part")
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--models", nargs="+", choices=["1.7B", "360M"], default=["1.7B", "360M"])
    parser.add_argument("--micro-batch", type=int, help="rows in a forward pass; default: by the device's memory")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all of it")
    parser.add_argument("--gpu", help=f"whose peak to count utilisation by: {', '.join(GPUS)}; default: by its name")
    parser.add_argument("--tiny", action="store_true", help="toy models, also without a GPU")
    arguments = parser.parse_args(argv)
    if arguments.gpu:
        gpu_named(arguments.gpu)
    if not (arguments.tiny or torch.cuda.is_available()):
        raise UsageError("there is no GPU here: add --tiny to see that the benchmark runs, on toy models")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise UsageError(f"the folder of --json {arguments.json} does not exist: make it, or name another file")
    if arguments.micro_batch is not None and (arguments.micro_batch < 1 or 16 % arguments.micro_batch):
        raise UsageError(f"--micro-batch {arguments.micro_batch} does not divide a step of 16 rows: take 1, 2, 4 or 8")
    if not arguments.seconds >= LEAST:
        raise UsageError(f"--seconds {arguments.seconds:g} is too short for any part: give at least {LEAST:g}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = arguments_of(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = measure(arguments, device)
    write(arguments.json, results)
    for line in table(results):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
