"""The train section: how long, how fast, in what precision."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from efficientllm.config.fields import Count, Device, Idle, Momentum, Natural, Place, Real, Section, Share, Trait
from efficientllm.errors import UsageError
from efficientllm.sizes import Position, exact_count

SCHEDULED = "with train.schedule {0.schedule}"


class TrainConfig(Section):
    """The training loop: how long, how fast, in what precision."""

    section: ClassVar[str] = "train"
    tokens: Annotated[Count, Trait.ARM] = Field(description="Tokens of the whole run")
    batch_tokens: Count = Field(default=524_288, description="Tokens of one optimizer step, all devices together")
    micro_batch: Annotated[Count, Trait.FREE] = Field(default=8, description="Rows in one forward pass on one device")
    lr: Annotated[Real, Trait.ARM] = Field(gt=0, description="Peak learning rate of AdamW")
    schedule: Literal["wsd", "cosine", "constant"] = Field(
        default="wsd", description="Learning rate after warm-up: stable then decay, cosine, or constant"
    )
    warmup: Place = Field(default=Position(0.02), description="Stretch of linear warm-up")
    decay: Annotated[Place, Idle(lambda train: train.schedule != "wsd", SCHEDULED)] = Field(
        default=Position(0.2), description="Last stretch of the run, where wsd decays"
    )
    min_lr: Annotated[Share, Idle(lambda train: train.schedule == "constant", SCHEDULED)] = Field(
        default=0.0, description="Learning rate at the end, as a fraction of lr"
    )
    weight_decay: Real = Field(default=0.05, ge=0, description="Decoupled; norms and biases are left out")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.95), description="Adam's two moving averages")
    grad_clip: Real = Field(default=1.0, ge=0, description="Largest global gradient norm; 0: no clipping")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16: autocast over fp32 weights; auto: bf16 on a GPU that has it, else fp32"
    )
    device: Annotated[Device, Trait.FREE] = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps or xpu")
    seed: Annotated[Natural, Trait.ARM] = Field(default=0, description="Of fresh weights and of the order of the rows")
    compile: Annotated[bool, Trait.FREE] = Field(default=False, description="Run the model through torch.compile")
    deterministic: Annotated[bool, Trait.FREE] = Field(
        default=False, description="On a GPU: kernels that add up in the same order every time, slower ones"
    )
    gradient_checkpointing: Annotated[bool, Trait.FREE] = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third slower"
    )
    loss: Annotated[Literal["auto", "plain", "chunked"], Trait.FREE] = Field(
        default="auto",
        description="chunked: never all logits of a micro-batch at once; auto: so on a GPU where they would take more "
        "than 1 GiB in fp32, else plain",
    )

    def batch_rows(self, sequence_length: int) -> int:
        """Rows of one step: the nearest positive multiple of micro_batch, or of 1 for less than one micro-batch."""
        unit = self.micro_batch if self.batch_tokens >= self.micro_batch * sequence_length else 1
        unit_tokens = unit * sequence_length
        return max(1, (2 * self.batch_tokens + unit_tokens) // (2 * unit_tokens)) * unit

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps that cover `tokens`; the last one may go over."""
        return -(-self.tokens // (self.batch_rows(sequence_length) * sequence_length))

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        decay = self.decay if self.schedule == "wsd" else Position(0)
        # One token over is rounding.
        if self.warmup.tokens(self.tokens) + decay.tokens(self.tokens) > self.tokens + 1:
            both = f"train.warmup ({self.warmup}) and train.decay ({decay}) together are"
            raise UsageError(f"{both} longer than the run ({exact_count(self.tokens)} tokens): shorten one of them")
        return self
