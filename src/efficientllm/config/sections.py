"""The recipe and its smaller sections, field by field."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from efficientllm.config.data import DataConfig
from efficientllm.config.fields import (
    AutoCount,
    AutoInterval,
    Count,
    Interval,
    Real,
    Section,
    Share,
    Text,
    Trait,
    explain,
)
from efficientllm.config.prune import PruneConfig
from efficientllm.config.train import TrainConfig
from efficientllm.errors import UsageError
from efficientllm.pruning.criteria import criteria_of
from efficientllm.sizes import Position, exact_count

SPAN, SPAN_STEPS = Position(0.15), 20  # what prune.end auto gives the loop to prune in: the longer


class DistillConfig(Section):
    """What a teacher adds to the loss."""

    section: ClassVar[str] = "distill"
    teacher: Text | None = Field(default=None, description="Folder, GGUF file or hub id; null: the source, as it was")
    weight: Share = Field(default=0.5, gt=0, description="Of the teacher's term; the rest is next-token loss")
    samples: Count | None = Field(
        default=None, description="Draws from the teacher kept on disk for each token (50, say); null: all, asked anew"
    )
    hidden: Real = Field(
        default=0.0,
        ge=0,
        description="Weight, beside both, of the distance to the teacher's residual stream after each layer but the "
        "last, at the channels that are left (1, say); the teacher is the source, or of its shape",
    )

    @model_validator(mode="after")
    def _draws_have_no_stream(self) -> Self:
        if self.hidden and self.samples is not None:
            raise UsageError(
                "distill.hidden needs a teacher that is asked anew, since draws do not hold its residual stream: leave "
                "out distill.samples"
            )
        return self


class DistributedConfig(Section):
    """Several processes, started by torchrun; a run of one process reads nothing here."""

    section: ClassVar[str] = "distributed"
    shard: Annotated[Literal["auto", "none", "full", "hybrid"], Trait.FREE] = Field(
        default="auto",
        description="none: a copy of the model on every device; full: every weight cut over all of them (FSDP2); "
        "hybrid: cut within a group, groups are copies; auto: none where it fits, else full, or hybrid where several "
        "nodes have several processes each",
    )
    replicate: Annotated[Literal["auto"] | Count, Trait.FREE] = Field(
        default="auto", description="Copies of the model with shard hybrid; auto: one a node, or 2"
    )
    timeout: Annotated[Real, Trait.FREE] = Field(
        default=600.0, gt=0, description="Seconds without a sign of life after which a rank counts as hung"
    )


class RunConfig(Section):
    """The run folder and how often something is written to it."""

    section: ClassVar[str] = "run"
    dir: Annotated[Text, Trait.FREE, Trait.ARM] = Field(
        description="Run folder; the same command on an existing one resumes"
    )
    checkpoint_every: Annotated[Interval, Trait.FREE] = Field(
        default=Position(0.1), description="Stretch between two checkpoints; after an hour one is made in any case"
    )
    keep: Annotated[Count, Trait.FREE] = Field(default=2, description="Checkpoints that are kept")
    validate_every: Annotated[AutoInterval, Trait.FREE] = Field(
        default="auto",
        description="Stretch between two validations; auto: 5% of the run or more, so that all of them take at most 5% "
        "of its FLOPs",
    )
    validation_tokens: AutoCount = Field(
        default="auto",
        description="Tokens of one validation, spread over the split; auto: as many as 5% of the run's FLOPs pay for, "
        "8 rows at least and 256Ki tokens at most",
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Trait.FREE] = Field(
        default=("tensorboard",), description="Where metrics go beside metrics.jsonl; [] for nowhere"
    )
    report: Annotated[bool, Trait.FREE, Trait.ARM] = Field(
        default=True, description="Write report.html with its plots when the run is done"
    )


class Recipe(Section):
    """A whole run. Bad input raises UsageError with one sentence, never pydantic's ValidationError."""

    source: Text = Field(
        description="Source model: transformers folder or GGUF file, relative to the current directory, or hub id"
    )
    tokenizer: Text | None = Field(
        default=None,
        description="Folder or GGUF file, relative to the current directory, or hub id; null: that of the source",
    )
    init: Literal["pretrained", "random"] = Field(
        default="pretrained", description="random: the source's architecture with fresh weights, the control"
    )
    resume: Text | None = Field(
        default=None,
        description="Checkpoint of another run, or snapshot of a ladder, to go on from: its weights, moments and place",
    )
    data: DataConfig = Field(description="The corpus")
    train: TrainConfig = Field(description="The training loop")
    prune: PruneConfig | None = Field(default=None, description="Pruning; null: plain continued pretraining")
    distill: DistillConfig | None = Field(default=None, description="Learn from a teacher too; null: from text alone")
    distributed: DistributedConfig = Field(
        default_factory=DistributedConfig, description="How several devices share the model"
    )
    run: RunConfig = Field(description="The run folder")

    @property
    def pruning_starts(self) -> int:
        """Tokens before pruning; 0 where nothing is pruned."""
        if self.prune is None:
            return 0
        automatic = self.train.warmup if self.prune.mode == "loop" else Position(0.0)
        return (automatic if self.prune.start == "auto" else self.prune.start).tokens(self.train.tokens)

    @property
    def pruning_ends(self) -> int:
        """Tokens at which the target is due, for the loop over a span. Within a few steps nothing would train while it
        is pruned, which is what the loop is for (docs/method.md, "Schedule")."""
        assert self.prune is not None
        total = self.train.tokens
        if self.prune.end != "auto":
            return self.prune.end.tokens(total)
        length = self.data.sequence_length
        steps = SPAN_STEPS * self.train.batch_rows(length) * length
        return min(self.pruning_starts + max(SPAN.tokens(total), steps), total // 2)

    @model_validator(mode="wrap")
    @classmethod
    def _one_sentence(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise UsageError(explain(error)) from None

    @model_validator(mode="after")
    def _teacher_knows_something(self) -> Self:
        if self.distill and self.distill.teacher is None and self.init == "random":
            raise UsageError("distill.teacher is missing: with init random the source has no weights to teach with")
        prune, distill = self.prune, self.distill
        if distill and distill.weight == 1.0 and distill.teacher is None and prune is not None:
            untrained = prune.mode != "loop" or prune.start == "auto" or not self.pruning_starts
            needs = {each.needs for each in criteria_of(prune.saliency, prune.units).values()}
            if untrained and "gradient" in needs:
                raise UsageError(
                    "distill.weight 1 leaves no gradient to prune by, since at first the source is its own teacher: "
                    "lower it (0.5), set prune.start, or leave prune.saliency at gate-fisher"
                )
        if distill and distill.hidden and prune is not None and prune.rotate == "auto":
            raise UsageError(
                "distill.hidden compares residual channels with the teacher's, and prune.rotate makes others of them: "
                "set prune.rotate to off"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_the_teachers(self) -> Self:
        if self.distill and self.prune is not None and self.prune.vocabulary:
            raise UsageError(
                "prune.types has vocab, after which a teacher speaks another vocabulary: leave out vocab, or distill"
            )
        return self

    @model_validator(mode="after")
    def _a_step_has_a_row(self) -> Self:
        tokens, length = self.train.batch_tokens, self.data.sequence_length
        if tokens < length:
            raise UsageError(
                f"train.batch_tokens ({exact_count(tokens)}) is less than one row of data.sequence_length "
                f"({exact_count(length)}): raise it to a row or more, or make rows shorter"
            )
        return self

    @model_validator(mode="after")
    def _pruning_fits(self) -> Self:
        if self.prune is None:
            return self
        start, end, total = self.prune.start, self.prune.end, self.train.tokens
        whole = self.prune.every is not None or self.prune.mode != "loop" or end == Position(1.0)
        ends = total if whole else self.pruning_ends
        if ends > total:
            raise UsageError(f"prune.end ({end}) lies beyond train.tokens ({exact_count(total)}): lower it")
        if self.pruning_starts >= ends:
            named = f"{exact_count(ends)} tokens" if end == "auto" else end
            last = "the end of the run" if whole else f"prune.end ({named})"
            if start == "auto":
                raise UsageError(
                    f"pruning starts at the end of train.warmup ({self.train.warmup}), which must come before {last}: "
                    "shorten the warm-up, move the end, or set prune.start"
                )
            raise UsageError(f"prune.start ({start}) must come before {last}: lower prune.start or move the end")
        return self
