"""The vocabulary as a pruning type: how many tokens fall, and what text made of the others costs.

A token's saliency is what its text costs once it is gone, in nats for each token of the text, as the other types'
saliency is. It is the tokens more that the text is made of (models/vocabulary.py counts them by the corpus) times the
nats that each of those costs, which the model itself says: one text in two encodings, the logits of what has fallen in
the second left out. How many fall is decided like the final shape is: by the least damage ahead, of the tokens and of
what else would still have to fall under the same target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from efficientllm.config import CostTarget, Recipe, WidthTarget
from efficientllm.errors import UsageError
from efficientllm.models.flops import forward_flops
from efficientllm.models.parts import EMBEDDING_WEIGHT, HEAD_WEIGHT, body, logits_of
from efficientllm.models.space import space_of
from efficientllm.models.vocabulary import Falling, Merges, cut_tokenizer, with_vocabulary
from efficientllm.pruning.decision import ByDamage, Standing
from efficientllm.pruning.feasible import FeasibleShapes
from efficientllm.pruning.groups import Space
from efficientllm.pruning.tokens import RENEWED
from efficientllm.training.chunked_loss import CHUNK_TOKENS, IGNORED
from efficientllm.training.gradient import Precision, model_inputs, next_tokens, token_ids
from efficientllm.training.planning import pruning_plan
from efficientllm.training.run_plan import RunPlan
from efficientllm.training.state import PruningPlan, TrainState
from efficientllm.training.step import OwnBatches
from efficientllm.training.targets import section_of

TEXT_TOKENS = 4096  # on which two encodings are compared
STEPS, CANDIDATES = 32, 8  # alignment leaves as many steps of the source's vocabulary; sizes that are weighed
LEAST_SHARE = 0.02  # of the parameters, that a fall takes: the corpus is encoded anew after each
LEAST_LEFT = 1 / 3  # of the source's tokens
MOST_GROWTH = 0.1  # of the text, in tokens: beyond that a sum over tokens is no measure of what the text has become
FEWEST_SPLITS = 64  # in that text, for their rate to count


def sizes_below(space: Space, rows: int, least: int, source_rows: int) -> list[int]:
    """Sizes of the vocabulary that are weighed, the largest first: multiples of the largest power of two up to 128 that
    leaves STEPS steps of the source's, each LEAST_SHARE of the parameters apart and no more than CANDIDATES."""
    step = max((step for step in (2, 4, 8, 16, 32, 64, 128) if step * STEPS <= source_rows), default=1)
    per_token = space.widths.hidden * sum(spec.name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) for spec in space.params)
    apart = max(LEAST_SHARE * float(space.num_params()) / per_token, (rows - least) / CANDIDATES)
    apart = max(1, round(apart / step)) * step
    return list(range((rows - apart) // step * step, least - 1, -apart))


@dataclass(frozen=True)
class Vocabulary:
    """What a run knows of its vocabulary. recipe: with sizes as amounts. config: of the source's family, with the rows
    that are left; source_rows: those of the source. held: ids that never fall, besides special ones. counts: how often
    each token is seen in the text to train on, fp64 (rows,), counted once it is asked for."""

    recipe: Recipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    source_rows: int
    held: Collection[int]
    counts: Callable[[], np.ndarray]
    precision: Precision

    @cached_property
    def falling(self) -> Falling:
        return Merges(self.tokenizer, self.held).falling(self.counts())

    @cached_property
    def milestones(self) -> dict[int, tuple[FeasibleShapes, ...]]:
        """Where the run may end with each size of the vocabulary that leaves it something to prune."""
        may_fall = int((self.falling.costs.cumsum() <= MOST_GROWTH).sum())
        least = max(self.config.vocab_size - may_fall, math.ceil(LEAST_LEFT * self.source_rows))
        return milestones_by_size(self.recipe, self.config, least, self.source_rows)

    def kept(self, rows: int) -> Tensor:
        """Ids that stay where so many rows do, int64 in rising order."""
        fallen = self.falling.ids[: self.config.vocab_size - rows]
        return torch.from_numpy(np.setdiff1d(np.arange(self.config.vocab_size), fallen))

    def choose(self, state: TrainState, passes: OwnBatches, guide: ByDamage, at: Standing) -> int | None:
        """As of pruning.contract.Probe.vocabulary. passes: on whose rows to come encodings are compared. A
        collective."""
        assert state.pruner is not None
        if not state.pruner.tokens.ask(state.pruner.parameters):
            return None
        with state.ranks.patience():  # minutes of Python where the vocabulary is large
            _ = self.falling, self.milestones
        within = {
            size: milestones[at.milestone]
            for size, milestones in self.milestones.items()
            if milestones[at.milestone].cost(at.widths) > milestones[at.milestone].target
        }
        rate = self.rate(state, passes) if within else 0.0
        best, chosen = guide.ahead(at.widths, state.pruner.feasible), None
        for size, feasible in within.items():
            total = guide.ahead(at.widths, feasible) + rate * self.falling.cost(self.config.vocab_size - size)
            if total < best:
                best, chosen = total, size
        return chosen

    def rate(self, state: TrainState, passes: OwnBatches) -> float:
        """Nats that each token more costs, as looked at in the smallest vocabulary, where the difference is the most;
        that of any token, the mean, where it makes fewer than FEWEST_SPLITS. A collective."""
        parts, read = list[tuple[Tensor, bool]](), 0
        while read < 2 * TEXT_TOKENS:
            rows = passes.rows("text")
            parts += rows.parts
            own = sum(token_ids(part).numel() for part, counts in rows.parts if counts)
            read += int(state.ranks.over_batch(torch.tensor(own)))
        texts = [self._texts(part) if counts else [""] for part, counts in parts]
        nats, tokens = self._nats(state, texts, self.config.vocab_size)
        nats_cut, tokens_cut = self._nats(state, texts, min(self.milestones))
        more = tokens_cut - tokens
        return max(0.0, (nats_cut - nats) / more) if more >= FEWEST_SPLITS else nats / max(1.0, tokens)

    def _texts(self, part: Tensor) -> list[str]:
        """The text of the first half of each row: made of smaller tokens it still fits into one."""
        halves = token_ids(part)[:, : part.shape[1] // 2].tolist()
        return [str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in halves]

    @torch.no_grad()
    def _nats(self, state: TrainState, texts: Sequence[list[str]], rows: int) -> tuple[float, float]:
        """Nats and tokens of the texts of all processes in a vocabulary of so many rows, ids in the model's own
        numbering; what would fall has no logit."""
        kept, whole = self.kept(rows), self.config.vocab_size
        with state.ranks.patience():
            encode: Any = self.tokenizer if rows == whole else cut_tokenizer(self.tokenizer, kept)
        lost = torch.ones(whole, dtype=torch.bool).index_fill_(0, kept, value=False)
        nats = tokens = flops = 0.0
        for part in texts:
            encoded = encode(part, add_special_tokens=False, verbose=False)["input_ids"]
            lines = self._lines([kept[torch.tensor(ids, dtype=torch.int64)].tolist() for ids in encoded])
            lines = lines.to(state.device)
            nats += float(state.runner.run(partial(_loss, state.model, lines, lost, self.precision)))
            tokens += sum(map(len, encoded))
            flops += forward_flops(state.space, len(part), lines.shape[1]).total
            state.ranks.beat()
        if state.ranks.world > 1:
            summed = state.ranks.over_batch(torch.tensor([nats, tokens, flops], dtype=torch.float64))
            nats, tokens, flops = summed.tolist()
        state.flops.looks += flops
        return nats, tokens

    def _lines(self, ids: Sequence[list[int]]) -> Tensor:
        """Rows of tokens with labels (data/planes.py): each after an EOS, so that all of it is predicted, and filled up
        with EOS that are not."""
        end, longest = int(self.tokenizer.eos_token_id), max(map(len, ids))
        lines = torch.full((len(ids), longest + 1, 2), IGNORED)
        lines[..., 0] = end
        for line, each in zip(lines, ids, strict=True):
            line[1 : len(each) + 1, 0] = line[: len(each), 1] = torch.tensor(each, dtype=torch.int64)
        return lines


def _loss(model: Any, lines: Tensor, lost: Tensor, precision: Precision) -> Tensor:
    """Cross-entropy summed over the labels, as of a model without the rows that are lost, nats."""
    with precision.context():
        hidden = body(model)(**model_inputs(lines)).last_hidden_state.flatten(0, 1)
    total, lost, labels = torch.zeros((), device=hidden.device), lost.to(hidden.device), next_tokens(lines).flatten()
    for part, own in zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
        with precision.context():
            logits = logits_of(model)(part).float()
        total += functional.cross_entropy(logits.masked_fill_(lost, -torch.inf), own, reduction="sum")
    return total


def with_amounts(recipe: Recipe, pruning: PruningPlan) -> Recipe:
    """The recipe with its sizes as the amounts, and its floors as the numbers, that they are in a plan of it: a share
    of what is left of the source would be another size, and has other default floors."""
    assert recipe.prune is not None
    sizes: list[Any] = [int(feasible.target) for feasible in pruning.milestones]
    if recipe.prune.cost != "params":
        key = recipe.prune.cost.replace("-", "_")
        sizes = [CostTarget.model_validate({key: int(feasible.target)}) for feasible in pruning.milestones]
    *ladder, target = sizes
    if isinstance(recipe.prune.target, WidthTarget):  # of a recipe without vocab, which resumes one that had it
        target = recipe.prune.target
    floors = section_of(pruning.feasible.floors, pruning.feasible.space.widths)
    prune = recipe.prune.model_copy(update={"target": target, "ladder": tuple(ladder) or None, "floors": floors})
    return recipe.model_copy(update={"prune": prune})


def milestones_by_size(
    recipe: Recipe, config: PretrainedConfig, least: int, source_rows: int
) -> dict[int, tuple[FeasibleShapes, ...]]:
    """Where a run may end with each size of the vocabulary, the largest first; without those that leave no shape."""
    found = {}
    for size in sizes_below(space_of(config), config.vocab_size, least, source_rows):
        try:
            narrower = pruning_plan(recipe, type(config)(**(config.to_dict() | {"vocab_size": size})))
        except UsageError:  # the target is no longer below what is left
            continue
        assert narrower is not None
        found[size] = narrower.milestones
    return found


def with_tokens(plan: RunPlan, kept: Tensor) -> RunPlan:
    """The plan of a run whose vocabulary has these rows left, by the schedule that it began with."""
    config = with_vocabulary(plan.source, kept)
    assert plan.pruning is not None
    pruning = pruning_plan(with_amounts(plan.recipe, plan.pruning), config)
    assert pruning is not None
    pruning = replace(pruning, schedule=plan.pruning.schedule)
    return replace(plan, source=config, space=pruning.feasible.space, pruning=pruning)


def asking_flops(plan: RunPlan) -> float:
    """Operations of the looks at two encodings in a run of this plan, at the most: all at the source's widths."""
    assert plan.pruning is not None
    left = float(plan.space.num_params(plan.pruning.feasible.balanced())) / float(plan.space.num_params())
    asks = 1 + int(math.log(left) / math.log(1.0 - RENEWED))
    return asks * 2.0 * forward_flops(plan.space, -(-2 * TEXT_TOKENS // plan.length), plan.length // 2).total


def expected(plan: RunPlan) -> tuple[RunPlan, int]:
    """For a forecast, which reads no text: the plan with the vocabulary at the size whose most balanced shape keeps the
    largest share of its narrowest width, the vocabulary among these; and that size."""
    assert plan.pruning is not None
    rows, shares, recipe = plan.source.vocab_size, dict[int, float](), with_amounts(plan.recipe, plan.pruning)
    for size, milestones in milestones_by_size(recipe, plan.source, math.ceil(LEAST_LEFT * rows), rows).items():
        counts, source = milestones[-1].balanced().counts(), plan.space.widths.counts()
        shares[size] = min(size / rows, *(counts[name] / source[name] for name in counts))
    best = max(shares, key=lambda size: shares[size], default=rows)
    return (with_tokens(plan, torch.arange(best)) if best < rows else plan), best
