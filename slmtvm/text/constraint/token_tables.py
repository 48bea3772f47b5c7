"""An automaton over bytes as one over the tokens of a vocabulary.

Tokens whose texts lead from every state to the same one are a class: words in a free text are one,
whatever they say. The texts are followed byte by byte, all states at once; what a prefix does is
looked up where another token began with one of the same effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slmtvm.errors import ConstraintError
from slmtvm.text.constraint.automaton import ByteAutomaton

_MOST_NUMBERS = 400_000_000  # in the tables on the way
_MOST_CLASSES = 65_000

_States = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TokenTexts:
    """Of each token: its bytes as the first of a text and after others; None: it is not written."""

    first: Sequence[bytes | None]
    other: Sequence[bytes | None]


@dataclass(frozen=True)
class TokenTables:
    """Texts start in state 0. Tokens of class 0 are never written.

    ``class_of`` (tokens,); ``rows``: of each state, the classes that may follow, sorted, and the
    states behind them (n, 2); ``left``: tokens until the text is whole, at least.
    """

    class_of: npt.NDArray[np.int64]
    class_count: int
    rows: list[npt.NDArray[np.int64]]
    left: npt.NDArray[np.int64]


def token_tables(automaton: ByteAutomaton, texts: TokenTexts, said: str) -> TokenTables:
    """The tables; from each state a whole text can be reached with the tokens that there are.

    Raises ConstraintError, with ``said``, where no text can be written, or it takes too much room.
    """
    effects = _Effects(automaton, said)
    classes: dict[tuple[int, int], int] = {}
    class_of = np.zeros(len(texts.other), np.int64)
    for token, (first, other) in enumerate(zip(texts.first, texts.other, strict=True)):
        from_start = effects.after(automaton.start, first)
        effect = effects.of(other)
        if from_start or effect:
            class_of[token] = classes.setdefault((effect, from_start), len(classes) + 1)
    if len(classes) > _MOST_CLASSES:
        raise _too_large(said)
    # State `count` is the start, before the first token.
    count = len(automaton.next)
    table = np.zeros((len(classes) + 1, count + 1), np.int64)
    for (effect, from_start), number in classes.items():
        table[number, :count] = effects.vectors[effect]
        table[number, count] = from_start
    accepts = np.append(automaton.accepts, automaton.accepts[automaton.start])
    return _trimmed(table, accepts, class_of, said)


def _too_large(said: str) -> ConstraintError:
    return ConstraintError(f"{said} takes too large tables for this vocabulary: make it simpler")


class _Effects:
    """What byte strings do to the states, each effect once; 0 leads all of them to the dead one."""

    def __init__(self, automaton: ByteAutomaton, said: str) -> None:
        self._next, self._said = automaton.next.astype(np.uint16), said
        count = len(automaton.next)
        self.vectors: list[_States] = [np.zeros(count, np.uint16)]
        self._numbers = {self.vectors[0].tobytes(): 0}
        self._identity = self._number(np.arange(count, dtype=np.uint16))
        self._after: dict[tuple[int, int], int] = {}

    def _number(self, vector: _States) -> int:
        key = vector.tobytes()
        if key not in self._numbers:
            if (len(self.vectors) + 1) * len(vector) > _MOST_NUMBERS:
                raise _too_large(self._said)
            self._numbers[key] = len(self.vectors)
            self.vectors.append(vector)
        return self._numbers[key]

    def of(self, text: bytes | None) -> int:
        """The effect of ``text``; of none, and of an empty one, which would lead nowhere: 0."""
        if not text:
            return 0
        effect = self._identity
        for byte in text:
            if effect == 0:
                break
            known = self._after.get((effect, byte))
            if known is None:
                known = self._number(self._next[self.vectors[effect], byte])
                self._after[effect, byte] = known
            effect = known
        return effect

    def after(self, state: int, text: bytes | None) -> int:
        """The state behind ``text``."""
        for byte in text or b"":
            state = int(self._next[state, byte])
        return state if text else 0


def _trimmed(
    table: npt.NDArray[np.int64],
    accepts: npt.NDArray[np.bool_],
    class_of: npt.NDArray[np.int64],
    said: str,
) -> TokenTables:
    """What can be reached from the start, the last column, and leads to a whole text."""
    reached = _reached(table, table.shape[1] - 1)
    left = _left(table, accepts, reached)
    start = table.shape[1] - 1
    if left[start] < 0:
        raise ConstraintError(f"{said} cannot be written with the tokens of this vocabulary")
    kept = np.concatenate([[start], reached[(left[reached] >= 0) & (reached != start)]])
    number = np.full(table.shape[1], -1, np.int64)
    number[kept] = np.arange(len(kept))
    small = np.where(table[:, kept] > 0, number[table[:, kept]], -1)
    small, again = np.unique(small, axis=0, return_inverse=True)
    # The class that nothing follows by comes first: all of it is -1.
    if (small[0] >= 0).any():
        small = np.vstack([np.full((1, len(kept)), -1), small])
        again = again + 1
    rows = []
    for column in small.T:
        live = np.flatnonzero(column >= 0)
        rows.append(np.stack([live, column[live]], axis=1))
    return TokenTables(again.reshape(-1)[class_of], len(small), rows, left[kept])


def _reached(table: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.int64]:
    """The states that tokens lead to from ``start``, sorted."""
    seen = np.zeros(table.shape[1], bool)
    seen[start] = True
    new = np.array([start])
    while len(new):
        behind = np.unique(table[:, new])
        new = behind[(behind > 0) & ~seen[behind]]
        seen[new] = True
    return np.flatnonzero(seen)


def _left(
    table: npt.NDArray[np.int64], accepts: npt.NDArray[np.bool_], reached: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """By state: the fewest tokens to one that accepts; -1 where none is reached."""
    width = table.shape[1]
    edges = [np.unique(table[:, state]) for state in reached]
    sources = np.repeat(reached, [len(behind) for behind in edges])
    targets = np.concatenate(edges)
    sources, targets = sources[targets > 0], targets[targets > 0]
    order = np.argsort(targets, kind="stable")
    sources, targets = sources[order], targets[order]
    begins = np.searchsorted(targets, np.arange(width + 1))
    left = np.full(width, -1, np.int64)
    new = reached[accepts[reached]]
    distance = 0
    while len(new):
        left[new] = distance
        behind = [sources[begins[state] : begins[state + 1]] for state in new]
        found = np.unique(np.concatenate(behind))
        new, distance = found[left[found] < 0], distance + 1
    return left
