"""The tokens that models of the corpus are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LENGTHS = (1, 1, 1, 1, 1, 23)  # of the sequences; the last is longer than every sliding window
LEAST_VOCAB_SIZE = 130  # of all families
_SOURCE_TOKENS = 11
_FIRST_TOKEN = 3  # those before are padding and the like, at which some models count positions
_PADDING = 6  # tokens on a side of a sentence
_SEED = 0

Side = Literal["left", "right"]


def token_sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    """Random tokens int32 (n,) for each of ``lengths``."""
    random = np.random.default_rng(_SEED)
    return [random.integers(_FIRST_TOKEN, vocab_size, n).astype(np.int32) for n in lengths]


@dataclass(frozen=True)
class Sentence:
    """Tokens int32 (n,), and which of them are no padding, bool (n,)."""

    tokens: np.ndarray
    visible: np.ndarray


def padded(tokens: np.ndarray, side: Side, padding: int | None) -> Sentence:
    """A sentence int32 (n,) with padding on one side: token ``padding``, or usual ones if None."""
    usual = np.arange(_FIRST_TOKEN, _FIRST_TOKEN + _PADDING)  # none ends a sentence
    more = usual if padding is None else np.full(_PADDING, padding)
    visible = np.arange(len(tokens) + _PADDING) < len(tokens)
    if side == "left":
        return Sentence(np.concatenate([more, tokens]).astype(np.int32), visible[::-1])
    return Sentence(np.concatenate([tokens, more]).astype(np.int32), visible)


def ended(tokens: np.ndarray, final_token: int | None) -> np.ndarray:
    """``tokens`` (n,) with the one at their end that every sequence must have there, if any."""
    return tokens if final_token is None else np.append(tokens[:-1], np.int32(final_token))


def source_of(kind: str) -> np.ndarray | None:
    """The tokens that an encoder-decoder reads first, int32 (s,)."""
    if kind != "encoder-decoder":
        return None
    return np.arange(_FIRST_TOKEN, _FIRST_TOKEN + _SOURCE_TOKENS, dtype=np.int32)
