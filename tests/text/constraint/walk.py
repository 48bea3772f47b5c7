"""A compiled constraint's file read and followed in Python, as the format says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_HEAD_WORDS = 26


class Rows:
    """Of each state: the tokens that may follow, and the states behind them."""

    def __init__(self, begins: np.ndarray, pairs: np.ndarray, of_class: list[list[int]]) -> None:
        self._begins, self._pairs, self._of_class = begins.tolist(), pairs, of_class
        self._known: dict[int, dict[int, int]] = {}

    def __getitem__(self, state: int) -> dict[int, int]:
        if state not in self._known:
            pairs = self._pairs[self._begins[state] : self._begins[state + 1]].tolist()
            self._known[state] = {t: then for class_, then in pairs for t in self._of_class[class_]}
        return self._known[state]


@dataclass
class Walked:
    rows: Rows
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
    assert all((class_of[list_] == i).all() for i, list_ in enumerate(of_class))
    row_begins, pairs = take(states + 1), take(2 * transitions).reshape(-1, 2)
    left, end_tokens = take(states).tolist(), set(take(ends).tolist())
    assert at == len(words)
    return Walked(Rows(row_begins, pairs, of_class), left, end_tokens)


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
