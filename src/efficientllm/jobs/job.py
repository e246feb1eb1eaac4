"""What a job is before its first step: everything that can be checked is checked here, before anything is spent."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.cache import cache_root, file_digest
from efficientllm.checkpoint.sharded import storage
from efficientllm.config import Recipe
from efficientllm.data.corpus import Corpus
from efficientllm.data.sampling import BatchStream
from efficientllm.distributed.layout import fits_whole, mesh_shape, with_mesh
from efficientllm.distributed.ranks import ALONE, World
from efficientllm.errors import UsageError
from efficientllm.jobs.device import choose_device
from efficientllm.jobs.run_folder import RunFolder
from efficientllm.jobs.text import bytes_per_token, check_can_shed, read_text
from efficientllm.models.loading import load_config, load_model, load_tokenizer, located
from efficientllm.models.space import space_of, widths_of
from efficientllm.pruning.dimensions import DIMENSIONS, HIDDEN, LAYERS
from efficientllm.reporting.trackers import Trackers, check_trackers
from efficientllm.sizes import format_count
from efficientllm.training.chunked_loss import CHUNK_TOKENS, is_chunked
from efficientllm.training.distillation import Distillation, LiveTeacher, Teacher
from efficientllm.training.gradient import Precision
from efficientllm.training.run_plan import RunPlan, run_plan
from efficientllm.training.state import PruningPlan, TrainState
from efficientllm.training.teacher_cache import FORMAT, CachedTeacher


@dataclass
class Unlogged:
    """Tokens and seconds since the last line of metrics."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """Everything that is fixed before the first step: the plan, and what it meets on this machine. Where tokens fall
    (jobs/vocabulary.py) another takes its place: tokens are the ids of the source that are left, None for all of them.
    """

    folder: RunFolder
    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    plan: RunPlan
    batches: BatchStream
    training: Sequence[Corpus]
    validation: Sequence[Corpus]
    corpora: list[str]  # name and content key of each; a run goes on only with the text that it began with
    unlogged: Unlogged
    trackers: Trackers
    ranks: World
    tokens: Tensor | None = None

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def pruning(self) -> PruningPlan | None:
        return self.plan.pruning

    @property
    def chunked_loss(self) -> bool:
        """Whether the logits of a micro-batch are made chunk by chunk (train.loss)."""
        train, vocabulary = self.recipe.train, self.plan.source.vocab_size
        return is_chunked(train.loss, self.device.type, train.micro_batch * self.plan.length, vocabulary)

    def bits_per_byte(self, loss: float) -> dict[str, float]:
        """A validation loss in bits for each byte of the text, where nats per token may be of other tokens by then."""
        falling = self.recipe.prune is not None and self.recipe.prune.vocabulary
        if not falling and self.tokens is None:
            return {}
        return {"validation_bits_per_byte": loss / math.log(2.0) / self._bytes_per_token}

    def in_its_tokens(self, loss: float) -> dict[str, float]:
        """The same, and how many tokens the model has."""
        bits = self.bits_per_byte(loss)
        return bits | {"vocabulary": self.plan.source.vocab_size} if bits else {}

    @cached_property
    def _bytes_per_token(self) -> float:
        return bytes_per_token(self.plan, self.tokenizer, self.validation)

    @property
    def stream(self) -> TextIO | None:
        """Where bars go: stderr (None), or nowhere on a process that does not lead."""
        return None if self.ranks.leads else _Nowhere()


class _Nowhere(io.StringIO):
    """A stream that drops whatever is written to it."""

    def write(self, text: str) -> int:
        return len(text)


def teacher_of(job: Job, state: TrainState) -> Distillation | None:
    """The frozen teacher that the recipe asks for: bf16 where training is, else fp32.

    Raises UsageError for one whose residual stream is not the state's source's.
    """
    distill = job.recipe.distill
    if distill is None:
        return None
    path = distill.teacher or job.recipe.source
    what = "distill.teacher" if distill.teacher else "source"
    config = load_config(path, what=what, use="a teacher")
    if distill.hidden:
        _check_stream(path, config, {name: len(units) for name, units in state.origin.items()})

    def load() -> PreTrainedModel:
        model = load_model(path, device=job.device, what=what).eval().requires_grad_(False)
        return model.to(torch.bfloat16) if job.precision.bf16 else model

    teacher: Teacher
    if distill.samples is None:
        teacher = LiveTeacher(load(), streams=distill.hidden > 0)
    else:
        root, length = cache_root(job.recipe.data.cache_dir), job.plan.length
        drawn = f"{length}-drawn-{FORMAT}-{distill.samples}"
        name = f"teacher-{model_digest(path, root / 'digests')}-{job.precision.name}-{drawn}"
        if job.ranks.world > 1:  # each process keeps what the teacher says to its own share of the rows
            name += f"-{job.ranks.rank}-of-{job.ranks.world}"
        teacher = CachedTeacher(root / name, load, length=length, samples=distill.samples, space=space_of(config))
    return Distillation(teacher, distill.weight, CHUNK_TOKENS, distill.hidden)


def _check_stream(path: str, config: PretrainedConfig, wanted: Mapping[str, int]) -> None:
    """Raises UsageError for a teacher that has other layers and channels than the source, whose are `wanted`, empty
    where it is not known which of them are left."""
    if not wanted:
        raise UsageError(
            "distill.hidden needs to know which channels of the source are left, and the checkpoint that this run goes "
            "on from does not say (an older version has made it, or its stem was turned); leave distill.hidden out"
        )
    widths = widths_of(config)
    if wanted != {name: widths[DIMENSIONS[name].width] for name in wanted}:
        raise UsageError(
            f"distill.hidden compares the source's own layers and channels ({wanted[LAYERS]} of {wanted[HIDDEN]}), and "
            f"teacher '{path}' has {widths.layers} of {widths.hidden}; choose a teacher of the source's shape, or "
            "leave distill.hidden out"
        )


def _check_teacher(recipe: Recipe, source: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError for one that is no model, speaks another vocabulary, or is to show other hidden states."""
    path, what = recipe.distill and recipe.distill.teacher, "distill.teacher"
    if not path:
        return
    config = load_config(path, what=what, use="a teacher")
    theirs, own = config.vocab_size, source.vocab_size
    if theirs != own or load_tokenizer(path, what=what).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"{what} '{path}' has another vocabulary ({theirs:,} entries) than the source ({own:,}); choose a teacher "
            "with the source's tokenizer"
        )
    if recipe.distill and recipe.distill.hidden and not recipe.resume:  # the source of a snapshot is a part of its own
        widths = widths_of(source)
        _check_stream(path, config, {LAYERS: widths.layers, HIDDEN: widths.hidden})


def model_digest(path: str, memory: Path) -> str:
    """Of the config and weights of a folder or GGUF file, or of a hub model's id and commit."""
    folder, digest = Path(located(path, "distill.teacher")), hashlib.sha256()
    if folder.is_dir():
        for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            digest.update(file_digest(file, memory).encode())
    else:
        digest.update(f"{path} {load_config(path)._commit_hash}".encode())
    return digest.hexdigest()[:16]


def prepare(recipe: Recipe, folder: RunFolder, say: Callable[[str], None], ranks: World = ALONE) -> Job:
    """Checks everything that can be checked, tokenises, and lays out the batches. A collective.

    The first process of each node tokenises; the others find the text in its cache.
    """
    ranks.together(lambda: _check_processes(folder, ranks))
    first = ranks.together(lambda: _prepared(recipe, folder, say, ranks) if ranks.local_rank == 0 else None)
    job = ranks.together(lambda: first or _prepared(recipe, folder, say, ranks))
    if ranks.world == 1:
        return job
    fits = ranks.from_first(lambda: _fits(job))
    ranks.together(lambda: mesh_shape(recipe.distributed, ranks.world, ranks.local_world, fits=fits))
    with_mesh(ranks, recipe.distributed, job.device, fits=fits)
    pieces = f"in {job.ranks.shards} shards" if job.ranks.shards > 1 else "whole"
    say(f"{ranks.world} processes, each weight {pieces} on {ranks.world // job.ranks.shards} of them")
    return job


def _check_processes(folder: RunFolder, ranks: World) -> None:
    """Raises UsageError where several processes could train but not save."""
    if ranks.world == 1:
        return
    storage()
    if not (folder.path / ".lock").exists():
        raise UsageError(f"run folder {folder.path} is not seen from every node; choose a run.dir on a disk they share")


def _fits(job: Job) -> bool:
    """Whether each device can keep the whole model; main memory always counts as enough."""
    if job.device.type != "cuda":
        return True
    memory = torch.cuda.get_device_properties(job.device).total_memory
    return fits_whole(int(job.plan.space.num_params()), memory)


def _prepared(recipe: Recipe, folder: RunFolder, say: Callable[[str], None], ranks: World) -> Job:
    device = choose_device(recipe.train.device, ranks)
    check_trackers(recipe.run.trackers)
    config = load_config(recipe.source)
    plan = run_plan(recipe, config)
    for advisory in plan.advisories:
        say(advisory)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.source)
    _check_teacher(recipe, config, tokenizer)
    length, rows = plan.length, plan.batch_rows
    training, validation, batches = read_text(plan, tokenizer, say)
    if recipe.prune and recipe.prune.vocabulary:
        check_can_shed(tokenizer, training)
    if rows % ranks.world:
        raise UsageError(
            f"a step of {rows} rows (train.batch_tokens) does not divide over {ranks.world} processes; make it a "
            f"multiple of {ranks.world} rows of {length} tokens, or start another number of processes"
        )
    for corpus, epochs in zip(training, batches.epochs(plan.steps), strict=True):
        if epochs > 1:
            say(f"{corpus.name}: {format_count(len(corpus) * length)} tokens will be read {epochs:.1f} times")
    precision = Precision.choose(recipe.train.precision, device)
    say(f"{plan.outline}; {device.type}, {precision.name}")
    corpora = [f"{corpus.name} {corpus.key}" for corpus in (*training, *validation)]
    text = batches, training, validation, corpora
    return Job(folder, device, precision, tokenizer, plan, *text, Unlogged(), Trackers(say), ranks)
