"""What pruning adds to the communication of a sharded run, in bytes that each process puts into collectives.

    torchrun --nproc-per-node 2 benchmarks/communication.py

A Llama of 10 M parameters from its config (hidden 256, 8 layers, FFN 1,024, vocabulary 4,096, untied), fp32, every
weight in shards, random tokens, on the CPU by gloo. Plain steps are FSDP2's own traffic: weights gathered for forward
and backward (embedding, last norm and LM head once), gradients scattered in fp32, (n - 1) / n of the data each. The
rest is counted where it is reduced (Ranks.communicated). Saliency is taylor-element, whose scores are added up at every
step.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from efficientllm.config import DistributedConfig, PruneConfig, TrainConfig
from efficientllm.distributed.launch import joined
from efficientllm.distributed.layout import with_mesh
from efficientllm.distributed.ranks import Ranks
from efficientllm.models.space import build, space_of
from efficientllm.pruning.schedule import SpanSchedule
from efficientllm.training.gradient import Precision
from efficientllm.training.loop import train_steps
from efficientllm.training.planning import options_and_milestones
from efficientllm.training.state import PruningPlan, start

ROWS, LENGTH, STEPS = 8, 128, 8
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=False,
)  # fmt: skip


class Batches:
    def batch(self, step: int, part: slice = slice(None), /) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)[part]


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    with joined() as ranks:
        if ranks.world == 1:
            raise SystemExit("start it by torchrun with 2 processes or more")
        for correction in ("none", "second-order"):
            lines += measured(ranks, correction)
        if ranks.leads:
            print("| run | per step, reductions of pruning | per event, beside that | plain step |")
            print("| --- | --- | --- | --- |")
            print("\n".join(lines))


def measured(ranks: Ranks, correction: str) -> list[str]:
    """One row of the table: a run of STEPS steps that prunes a twelfth."""
    with_mesh(ranks, DistributedConfig(shard="full"), torch.device("cpu"), fits=True)
    torch.manual_seed(0)
    model = build(CONFIG)
    space = space_of(model.config)
    prune = PruneConfig.model_validate(
        {"target": "92%", "saliency": "taylor-element", "correction": correction, "align": 1}
    )
    options, milestones = options_and_milestones(prune, space)
    tokens = STEPS * ROWS * LENGTH
    schedule = SpanSchedule(0, tokens, space.num_params(), milestones[-1].target, "linear")
    plan = PruningPlan(model.config, milestones, schedule, options, 1.0)
    train = TrainConfig.model_validate({"tokens": tokens, "lr": 1e-4, "batch_tokens": ROWS * LENGTH, "micro_batch": 8})
    state = start(model, train, plan, ranks)
    outside = 2 * CONFIG.vocab_size * CONFIG.hidden_size + CONFIG.hidden_size
    plain = (12 * int(space.num_params()) - 4 * outside) * (ranks.world - 1) // ranks.world
    events = added = pruned = 0
    before = ranks.communicated
    for record in train_steps(
        state,
        Batches(),
        train,
        plan,
        steps=STEPS,
        precision=Precision("cpu", False),
        batch_rows=ROWS,
    ):
        number = len(record.prune.events) if record.prune else 0
        sent, before = ranks.communicated - before, ranks.communicated
        events, added, pruned = events + number, added + (sent if number else 0), pruned + bool(number)
    scores = 4 * (CONFIG.hidden_size + CONFIG.num_hidden_layers * (1024 + 256 + 256 + 1))
    loss = 4  # the step's mean loss
    an_event = (added - pruned * (scores + loss)) / events  # in the steps that had one
    return [
        f"| correction {correction}, {events} events | {(scores + loss) / 1e3:.1f} kB ({(scores + loss) / plain:.3%}) "
        f"| {an_event / 1e3:.1f} kB ({an_event / plain:.2%}) | {plain / 1e6:.1f} MB |"
    ]


if __name__ == "__main__":
    main()
