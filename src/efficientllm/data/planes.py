"""What a row says beside its tokens, for whoever trains on it: rows get further planes only where they need them.

int64 (rows, length)       the tokens, each of which is predicted from those before it
int64 (rows, length, 2)    and the label at each place: the next token, -100 where there is none to predict
int64 (rows, length, 3)    and the position of each token in its document, for attention that stays within it
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from efficientllm.data.rows import BEGINS, CONTEXT

NO_LABEL = -100


class Planes(IntEnum):
    """How many planes a row has."""

    TOKENS = 1
    LABELS = 2
    POSITIONS = 3


def with_planes(ids: np.ndarray, marks: np.ndarray | None, planes: Planes, end: int) -> np.ndarray:
    """Rows as above. ids: int64 (rows, length). marks: uint8 like them; None: all is predicted, and a document begins
    after each EOS, `end`. With positions the first token of a document, which nothing before it is seen of, is not
    predicted."""
    if planes == Planes.TOKENS:
        return ids
    labels = np.full_like(ids, NO_LABEL)
    labels[:, :-1] = ids[:, 1:]
    if marks is not None:
        labels[:, :-1][marks[:, 1:] & CONTEXT > 0] = NO_LABEL
    if planes == Planes.LABELS:
        return np.stack([ids, labels], axis=-1)
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, :-1] == end if marks is None else marks[:, 1:] & BEGINS > 0
    labels[:, :-1][begins[:, 1:]] = NO_LABEL
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return np.stack([ids, labels, positions], axis=-1)
