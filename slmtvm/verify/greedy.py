"""Greedy generation against onnxruntime: how far the tokens agree, and why they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slmtvm.verify.reference import Reference


class Generator(Protocol):
    """What the comparison needs of a session."""

    def reset(self) -> None: ...

    def eval(self, tokens: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class GreedyComparison:
    """``tokens`` the bundle's greedy tokens; the first ``agreed`` are onnxruntime's too.

    ``gap``: where they part, how much onnxruntime's best logit exceeds that of the bundle's token;
    None where they never part.
    """

    tokens: tuple[int, ...]
    agreed: int
    gap: float | None


def compare_greedy(
    session: Generator, reference: Reference, prompt: Sequence[int], count: int = 64
) -> GreedyComparison:
    """``count`` greedy tokens after ``prompt``, one at a time, against onnxruntime's.

    The model is causal: onnxruntime evaluates prompt and tokens at once, and up to the first
    difference its choices are those it would have made one at a time.
    """
    session.reset()
    tokens = [int(session.eval(np.array(prompt, np.int32)).argmax())]
    while len(tokens) < count:
        tokens.append(int(session.eval(np.array(tokens[-1:], np.int32)).argmax()))
    logits = reference.rows([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    for at, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        if int(row.argmax()) != token:
            return GreedyComparison(tuple(tokens), at, float(row.max() - row[token]))
    return GreedyComparison(tuple(tokens), count, None)
