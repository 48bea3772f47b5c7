"""A regex as the smallest automaton over bytes of UTF-8.

outlines-core (its Rust regex engine) determinizes: it is given the 256 bytes as its vocabulary.
Its matches are those of the first alternative that fits; only with the text's end in the regex does
it find all of them. A byte in front keeps the end from being at the start, which it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slmtvm.errors import ConstraintError

MOST_STATES = 30_000
# It is searched for in the middle of texts, too: where they can hold the byte in front, that takes
# long. Those of JSON schemas cannot hold this one.
_IN_FRONT = 0
_END_OF_TEXT = 256  # outlines-core asks for a token that ends texts
_SALT = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class ByteAutomaton:
    """State 0 is the dead one. ``next`` (states, 256) int32; ``accepts`` (states,) bool."""

    next: npt.NDArray[np.int32]
    accepts: npt.NDArray[np.bool_]
    start: int


def byte_automaton(regex: str, said: str) -> ByteAutomaton:
    """The automaton of what ``regex``, in Rust's syntax, matches from the first to the last byte.

    From each of its states but the dead one a match can be reached. Raises ConstraintError, with
    ``said``, where there is none, the regex is beyond that syntax, or it takes too many states.
    """
    outlines_core = _outlines_core()
    vocabulary = outlines_core.Vocabulary(_END_OF_TEXT, {bytes([b]): [b] for b in range(256)})
    try:
        index = outlines_core.Index(rf"\x{_IN_FRONT:02x}(?:{regex})\z", vocabulary)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConstraintError(f"{said} is no regex that can be compiled: {reason}") from error
    transitions = index.get_transitions()
    if len(transitions) > 20 * MOST_STATES:
        raise _too_large(said)
    # Equal regexes give equal numbers, whatever order the dictionary has.
    numbers = {state: i + 1 for i, state in enumerate(sorted(transitions))}
    table = np.zeros((len(numbers) + 1, 256), np.int32)
    for state, row in transitions.items():
        for byte, then in row.items():
            if byte != _END_OF_TEXT:
                table[numbers[state], byte] = numbers[then]
    accepts = np.zeros(len(table), bool)
    accepts[[numbers[state] for state in index.get_final_states()]] = True
    start = table[numbers[index.get_initial_state()], _IN_FRONT]
    return _smallest(table, accepts, int(start), said)


def _outlines_core() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise ConstraintError(
            "constraints are compiled with the package outlines-core: pip install "
            "'slmtvm[constrain]'; who only follows compiled ones does not need it"
        ) from error
    return outlines_core


def _too_large(said: str) -> ConstraintError:
    return ConstraintError(
        f"{said} takes more than {MOST_STATES} states: bound its strings and arrays closer, or not "
        "at all, and use fewer character classes of Unicode"
    )


def _smallest(
    table: npt.NDArray[np.int32], accepts: npt.NDArray[np.bool_], start: int, said: str
) -> ByteAutomaton:
    """The automaton without what leads to no match, and with equal states as one (Moore's way)."""
    alive = accepts.copy()
    while True:
        more = alive | alive[table].any(axis=1)
        if (more == alive).all():
            break
        alive = more
    if not alive[start]:
        raise ConstraintError(f"{said} lets no text be written")
    table = np.where(alive[table], table, 0)
    bytes_, columns = np.unique(table, axis=1, return_inverse=True)
    weights = np.arange(1, bytes_.shape[1] + 2, dtype=np.uint64) * np.uint64(_SALT)
    weights ^= weights >> np.uint64(29)
    block = np.where(accepts, 2, np.where(alive, 1, 0)).astype(np.int64)
    count = len(np.unique(block))
    while True:
        # States of a block that lead to the same blocks stay together; by a sum that tells apart.
        key = block[bytes_].astype(np.uint64) * weights[:-1]
        key ^= key >> np.uint64(31)
        sums = (key * np.uint64(_SALT | 1)).sum(axis=1) + block.astype(np.uint64) * weights[-1]
        _, block = np.unique(sums, return_inverse=True)
        block = block.reshape(-1)
        if (now := block.max() + 1) == count:
            break
        count = now
    # What the sums say is checked: equal ones must be of equal states.
    _, first = np.unique(block, return_index=True)
    representative = first[block]
    assert (block[bytes_] == block[bytes_[representative]]).all()
    assert (accepts == accepts[representative]).all() and (alive == alive[representative]).all()
    order = np.argsort(first, kind="stable")  # the dead state, 0, comes first
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    kept = first[order]
    smaller = number[block[bytes_[kept]]][:, columns.reshape(-1)].astype(np.int32)
    if count > MOST_STATES:
        raise _too_large(said)
    return ByteAutomaton(smaller, accepts[kept], int(number[block[start]]))
