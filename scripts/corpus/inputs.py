"""The tokens that models of the corpus are compared on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTHS = (1, 1, 1, 1, 1, 23)  # of the sequences; the last is longer than every sliding window
LEAST_VOCAB_SIZE = 130  # of all families
_SOURCE_TOKENS = 11
_FIRST_TOKEN = 3  # those before are padding and the like, at which some models count positions
_SEED = 0


def token_sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    """Random tokens int32 (n,) for each of ``lengths``."""
    random = np.random.default_rng(_SEED)
    return [random.integers(_FIRST_TOKEN, vocab_size, n).astype(np.int32) for n in lengths]


def source_of(kind: str) -> np.ndarray | None:
    """The tokens that an encoder-decoder reads first, int32 (s,)."""
    if kind != "encoder-decoder":
        return None
    return np.arange(_FIRST_TOKEN, _FIRST_TOKEN + _SOURCE_TOKENS, dtype=np.int32)
