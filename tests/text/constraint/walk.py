"""A compiled constraint's file read and followed in Python, as the format says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_HEAD_WORDS = 26


@dataclass
class Walked:
    class_of: np.ndarray
    classes: list[list[int]]
    rows: list[dict[int, int]]  # token -> state
    left: list[int]
    ends: set[int]


def read(content: bytes) -> Walked:
    words = np.frombuffer(content, "<u4")
    assert content[:8] == b"SLMCONS\0" and words[3] == len(words)
    vocab, classes, listed, states, transitions, ends = (int(w) for w in words[4:10])
    at = _HEAD_WORDS

    def take(count: int) -> np.ndarray:
        nonlocal at
        at += count
        return words[at - count : at]

    class_of = take((vocab + 1) // 2).view("<u2")[:vocab]
    begins, tokens = take(classes + 1), take(listed)
    of_class = [tokens[a:b].tolist() for a, b in pairwise(begins)]
    row_begins, pairs = take(states + 1), take(2 * transitions).reshape(-1, 2)
    rows = [
        {token: int(then) for class_, then in pairs[a:b] for token in of_class[class_]}
        for a, b in pairwise(row_begins)
    ]
    left, end_tokens = take(states).tolist(), set(take(ends).tolist())
    assert at == len(words)
    return Walked(class_of, of_class, rows, left, end_tokens)


def write_text(walked: Walked, rng: random.Random, most: int) -> list[int]:
    """Random tokens that may follow each other, a whole text of up to ``most``."""
    state, made = 0, []
    while True:
        row = walked.rows[state]
        reach = [t for t, then in row.items() if walked.left[then] < most - len(made)]
        if walked.left[state] == 0 and (not reach or rng.random() < 0.2):
            return made
        made.append(rng.choice(reach))
        state = row[made[-1]]
