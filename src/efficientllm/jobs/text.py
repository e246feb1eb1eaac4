"""The text of a run in a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from efficientllm.data.corpus import Corpus, load_corpora
from efficientllm.data.sampling import BatchStream
from efficientllm.errors import UsageError
from efficientllm.evaluation.validation import chosen_rows
from efficientllm.models.vocabulary import Merges, token_bytes
from efficientllm.training.chunked_loss import IGNORED
from efficientllm.training.gradient import next_tokens
from efficientllm.training.run_plan import RunPlan


def read_text(
    plan: RunPlan, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> tuple[list[Corpus], list[Corpus], BatchStream]:
    """What is trained and validated on, in a tokenizer's tokens, and its batches. Raises UsageError."""
    data = plan.recipe.data
    training, validation = load_corpora(data, tokenizer, vocab_size=plan.source.vocab_size, on_progress=say)
    try:
        weights = [corpus.weight for corpus in training]
        return training, validation, BatchStream(training, weights, plan.batch_rows, plan.recipe.train.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_can_shed(
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Corpus],
    why: str = "prune.types has vocab, which",
    mend: str = "leave vocab out",
) -> None:
    """Raises UsageError where no tokens could fall, or have: text is encoded anew when they do. why: it is asked."""
    Merges(tokenizer)
    for corpus in training:
        if corpus.content != "text":
            holds = {"chat": "conversations", "tokens": "tokens"}[corpus.content]
            raise UsageError(f"{why} has text encoded anew, but '{corpus.name}' holds {holds}; {mend}")


def bytes_per_token(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, validation: Sequence[Corpus]) -> float:
    """UTF-8 bytes of the text that a token predicted in validation stands for, the mean."""
    sizes, predicted, length = token_bytes(tokenizer, plan.source.vocab_size), 0, 0
    for corpus, indices in zip(validation, chosen_rows(validation, plan.pace.rows), strict=True):
        labels = next_tokens(corpus.take(indices))
        predicted += int((labels != IGNORED).sum())
        length += int(sizes[labels[labels != IGNORED]].sum())
    return length / max(1, predicted)
