"""The parts of benchmarks/gpu.py: each compares ways to take a step of one model in turn, and returns plain figures."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from gpu_rivals import beside_trainer, plain_loop
from gpu_shapes import Shape, two_shapes
from gpu_subjects import Kind, Subject

from efficientllm.models.space import space_of
from efficientllm.training.chunked_loss import is_chunked

ROUNDS = 8
FEWEST = 3  # rounds that a median is taken of, where time is short
DEFAULT_BATCH = 524_288  # train.batch_tokens where a recipe does not say


class LeftOut(BaseException):  # none of Exception, so that nobody's `except Exception` keeps a part going
    """Why a part has no figures."""


def spread(values: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median, "low": min, "high": max, "mean": statistics.fmean}
    return {name: float(of(values)) for name, of in figures.items()}


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Each way's seconds over those of `base` in the same round."""
    return {
        name: spread([own / other for own, other in zip(values, seconds[base], strict=True)])
        for name, values in seconds.items()
        if name != base
    }


class Bench:
    """All parts for one shape. The model in our loop is kept between parts until drop()."""

    def __init__(self, shape: Shape, device: torch.device, *, peak: float | None, tiny: bool) -> None:
        self.shape, self.device, self._peak = shape, device, peak
        self._rounds = 3 if tiny else ROUNDS
        self._backend = "eager" if tiny else "inductor"
        self._subject: Subject | None = None
        self.deadline = float("inf")  # of the part that runs, by time.monotonic()

    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = Subject(self.shape, self.device, self._backend)
        return self._subject

    def drop(self) -> None:
        self._subject = None
        torch._dynamo.reset()  # its cache counts the graphs of all shapes against one limit

    def facts(self) -> dict[str, Any]:
        shape = self.shape
        tokens, vocabulary = shape.micro * shape.length, shape.config.vocab_size
        return {
            "parameters": int(space_of(shape.config).num_params()),
            "rows": shape.rows,
            "micro_batch": shape.micro,
            "length": shape.length,
            "loss_auto": "chunked" if is_chunked("auto", self.device.type, tokens, vocabulary) else "plain",
            "model_flops_per_step": shape.model_flops,
            "compile_backend": self._backend,
        }

    def _rate(self, seconds: list[float], shape: Shape | None = None) -> dict[str, Any]:
        shape = shape or self.shape
        median = statistics.median(seconds)
        rate = shape.model_flops / median
        return {
            "seconds": median,
            "tokens_per_second": shape.tokens / median,
            "model_flops_per_second": rate,
            "utilisation": rate / self._peak if self._peak else None,
        }

    def _peak_of(self, take: Callable[[], object]) -> int | None:
        """Bytes that PyTorch has allocated at most during a step; None where it does not count."""
        if self.device.type != "cuda":
            take()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        take()
        return torch.cuda.max_memory_allocated(self.device)

    def _turns(self) -> Iterator[int]:
        """Rounds to take: all, or fewer where the next one would not be done before the part's deadline."""
        began = time.monotonic()
        for turn in range(self._rounds):
            now = time.monotonic()
            if turn >= FEWEST and now + 1.5 * (now - began) / turn > self.deadline:
                return
            yield turn

    def _in_turn(self, kinds: Mapping[str, Kind], base: str) -> dict[str, Any]:
        """A warm-up of each kind, one that measures memory, then rounds."""
        subject = self.subject()
        for kind in kinds.values():
            subject.step(kind)
        memory = {name: self._peak_of(lambda kind=kind: subject.step(kind)) for name, kind in kinds.items()}
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in self._turns():
            for name, kind in kinds.items():
                seconds[name].append(subject.step(kind)[0])
        return {
            "ways": {name: self._rate(values) | {"peak_memory": memory[name]} for name, values in seconds.items()},
            "base": base,
            "ratios": ratios(seconds, base),
            "rounds": len(seconds[base]),
        }

    def step(self) -> dict[str, Any]:
        kinds = {
            "plain": Kind(),
            "saliency": Kind("saliency"),
            "event": Kind("event"),
            "correction": Kind("correction"),
            "plain loss": Kind(loss="plain"),
            "chunked loss": Kind(loss="chunked"),
        }
        found = self._in_turn(kinds, "plain")
        ways = {name: way["seconds"] for name, way in found["ways"].items()}
        steps = DEFAULT_BATCH / self.shape.tokens
        added = ways["event"] - ways["plain"]
        return found | {
            "agreement": self.subject().agreement(),
            "event_seconds": {
                "without correction": ways["event"] - ways["saliency"],
                "with correction": ways["correction"] - ways["saliency"],
            },
            "pruning_at_default_batch": 1.0 + added / (steps * ways["plain"]),
        }

    def compile(self) -> dict[str, Any]:
        kinds = {"compiled": Kind(compiled=True), "compiled, event": Kind("event", compiled=True), "eager": Kind()}
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        found = self._in_turn(kinds, "compiled")
        return found | {"graphs": counters["stats"]["unique_graphs"] - before}

    def _ours(self) -> dict[str, Callable[[], float]]:
        subject = self.subject()
        return {
            "ours": lambda: subject.step(Kind())[0],
            "ours, compiled": lambda: subject.step(Kind(compiled=True))[0],
        }

    def _against(self, rival: str, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
        """speedup: the rival's seconds over ours."""
        ways = {name: self._rate(values) for name, values in seconds.items()}
        speedup = {
            name: spread([theirs / own for own, theirs in zip(values, seconds[rival], strict=True)])
            for name, values in seconds.items()
            if name != rival
        }
        return {"ways": ways, "base": rival, "speedup": speedup, "rounds": len(seconds[rival])}

    def trainer(self) -> dict[str, Any]:
        if importlib.util.find_spec("accelerate") is None:
            raise LeftOut("accelerate, which transformers' Trainer needs, is not installed; see part loop")
        takes = self._ours()
        seconds = beside_trainer(self.shape, self.device, takes, self._turns())
        return self._against("trainer", seconds)

    def loop(self) -> dict[str, Any]:
        takes = {"loop": plain_loop(self.shape, self.device), **self._ours()}
        for take in takes.values():
            take()
            take()
        seconds: dict[str, list[float]] = {name: [] for name in takes}
        for _ in self._turns():
            for name, take in takes.items():
                seconds[name].append(take())
        return self._against("loop", seconds)

    def compaction(self) -> dict[str, Any]:
        subject = self.subject()
        subject.step(Kind("event"))
        plain = statistics.median(subject.step(Kind())[0] for _ in range(3))
        before = subject.state.allocated_parameters
        found: list[tuple[float, Any]] = []
        memory = self._peak_of(lambda: found.append(subject.compaction()))
        (seconds, widths), after = found[0], subject.state.allocated_parameters
        first = subject.step(Kind())[0]
        self.drop()
        return {
            "seconds": seconds,
            "steps": seconds / plain,
            "step_after_seconds": first,
            "widths": str(widths),
            "parameters": [before, after],
            "peak_memory": memory,
        }

    def widths(self) -> dict[str, Any]:
        self.drop()
        aligned, odd = two_shapes(self.shape)
        both = {shape.name: Subject(shape, self.device, self._backend, prunable=False) for shape in (aligned, odd)}
        ways = {
            name + ending: (subject, Kind(compiled=compiled))
            for ending, compiled in (("", False), (", compiled", True))
            for name, subject in both.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for subject, kind in [*ways.values()] * 2:
            subject.step(kind)
        for _ in self._turns():
            for name, (subject, kind) in ways.items():
                seconds[name].append(subject.step(kind)[0])
        shapes = {"aligned": aligned, "unaligned": odd}
        return {
            "shapes": {
                name: {
                    "widths": str(space_of(each.config).widths),
                    "parameters": int(space_of(each.config).num_params()),
                }
                for name, each in shapes.items()
            },
            "ways": {name: self._rate(values, shapes[name.partition(",")[0]]) for name, values in seconds.items()},
            "base": "aligned",
            "ratios": ratios(seconds, "aligned"),
            "rounds": len(seconds["aligned"]),
        }
