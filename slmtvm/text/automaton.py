"""A regex as an automaton over classes of characters, with the matches that backtracking finds.

A state is the list of places in the regex where a backtracking matcher could stand, those that it
would try first at the front (Cox, "Regular Expression Matching: the Virtual Machine Approach",
2009). Behind a place where the regex has matched nothing counts: a match that comes later is of a
place before it. A look-ahead is waited for: the match it allows is known one character late.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.characters import CODE_POINTS, CharSet, asked_codes, regex_class, stands_for
from slmtvm.text.regex import (
    Chars,
    Choice,
    Look,
    Node,
    Repeat,
    Sequence,
    TextEnd,
    TextStart,
)

_MOST_STATES = 4000
_MOST_SETS = 60
ENDS_HERE, ENDS_BEFORE = 1, 2  # a match ends behind the character that was read, or in front of it


@dataclass(frozen=True)
class Automaton:
    """State 0 is the dead one. ``next`` (states, classes), ``classes`` (0x110000,), all uint16."""

    classes: npt.NDArray[np.uint16]
    next: npt.NDArray[np.uint16]
    accepts: npt.NDArray[np.uint16]  # by state: ENDS_HERE, ENDS_BEFORE or 0
    at_end: npt.NDArray[np.uint16]  # by state: 1 where a match ends if the text does
    first_start: int  # where a match that starts with the text begins
    start: int


@dataclass(frozen=True)
class _Step:
    """One character of the set, then the place ``then``."""

    chars: int
    then: int


@dataclass(frozen=True)
class _Fork:
    first: int
    second: int


@dataclass(frozen=True)
class _Wait:
    """A match, if the next character is (``wanted``) in the set or is not; the end is in none.

    ``chars`` None: if the text ends.
    """

    chars: int | None
    wanted: bool


@dataclass(frozen=True)
class _Start:
    then: int


@dataclass(frozen=True)
class _Match:
    pass


# What a state is made of, in order: places of steps, waits, and at last a match or a late match.
_Late = "late"
_Item = int | _Wait | _Match | str
_State = tuple[_Item, ...]


def compile_automaton(node: Node, said: str) -> Automaton:
    """The automaton of a regex; ``said`` is how it is written, for errors.

    Raises UnsupportedTokenizerError where it can match nothing at all, has a look-ahead before its
    end, is possessive where that makes a difference, or needs too many states.
    """
    return _Compiler(said).compile(node)


class _Compiler:
    def __init__(self, said: str) -> None:
        self.said = said
        self.program: list[_Step | _Fork | _Wait | _Start | _Match | None] = [_Match()]
        self.sets: list[CharSet] = []
        self.set_numbers: dict[str, int] = {}

    def refused(self, what: str) -> UnsupportedTokenizerError:
        return UnsupportedTokenizerError(f"the regex {self.said!r} {what}")

    def compile(self, node: Node) -> Automaton:
        if nullable(node):
            raise self.refused("matches where there is nothing, which is not compiled")
        self.check_possessive(node, None)
        start = self.emit(node, 0)
        if len(self.sets) > _MOST_SETS:
            raise self.refused("has too many classes of characters")
        classes, members = self.partition()
        return self.determinize(start, classes, members)

    # ---- the program ----

    def set_of(self, chars: Chars) -> int:
        if chars.pattern not in self.set_numbers:
            self.set_numbers[chars.pattern] = len(self.sets)
            self.sets.append(regex_class(chars.pattern))
        return self.set_numbers[chars.pattern]

    def add(self, step: _Step | _Fork | _Wait | _Start | None) -> int:
        self.program.append(step)
        return len(self.program) - 1

    def emit(self, node: Node, then: int) -> int:
        """Adds ``node`` before the place ``then``; where it starts."""
        if isinstance(node, Chars):
            return self.add(_Step(self.set_of(node), then))
        if isinstance(node, Sequence):
            for item in reversed(node.items):
                then = self.emit(item, then)
            return then
        if isinstance(node, Choice):
            starts = [self.emit(option, then) for option in node.options]
            at = starts.pop()
            while starts:
                at = self.add(_Fork(starts.pop(), at))
            return at
        if isinstance(node, Repeat):
            return self.emit_repeat(node, then)
        if isinstance(node, TextStart):
            return self.add(_Start(then))
        if then != 0:
            raise self.refused("looks ahead before its end, which is not compiled")
        if isinstance(node, TextEnd):
            return self.add(_Wait(None, wanted=True))
        return self.add(_Wait(self.set_of(node.chars), wanted=not node.negative))

    def emit_repeat(self, node: Repeat, then: int) -> int:
        def fork(inside: int, after: int) -> _Fork:
            return _Fork(after, inside) if node.lazy else _Fork(inside, after)

        if node.most is None:
            if nullable(node.item):
                raise self.refused("repeats what may be nothing, which is not compiled")
            at = self.add(None)
            self.program[at] = fork(self.emit(node.item, at), then)
        else:
            at = then
            for _ in range(node.most - node.least):
                at = self.add(fork(self.emit(node.item, at), then))
        for _ in range(node.least):
            at = self.emit(node.item, at)
        return at

    # ---- possessive repeats: compiled as greedy ones, where that is the same ----

    def check_possessive(self, node: Node, after: list[Node] | None) -> None:
        after = after or []
        if isinstance(node, Sequence):
            for i, item in enumerate(node.items):
                self.check_possessive(item, [*node.items[i + 1 :], *after])
        elif isinstance(node, Choice):
            for option in node.options:
                self.check_possessive(option, after)
        elif isinstance(node, Repeat):
            self.check_possessive(node.item, [node.item, *after])
            if node.possessive and not self.keeps_all(node.item, after):
                raise self.refused("is possessive where it matters, which is not compiled")

    def keeps_all(self, item: Node, after: list[Node]) -> bool:
        """Whether giving back some of ``item`` never helps what comes after it."""
        if not isinstance(item, Chars):
            return False
        if all(nullable(node) and not _looks(node) for node in after):
            return True
        mine = self.sets[self.set_of(item)]
        for node in after:
            if _looks(node) or any((mine & self.sets[s]).any() for s in self.firsts(node)):
                return False
            if not nullable(node):
                return True
        return False

    def firsts(self, node: Node) -> set[int]:
        """The sets that its first character may be of."""
        if isinstance(node, Chars):
            return {self.set_of(node)}
        if isinstance(node, Sequence):
            found: set[int] = set()
            for item in node.items:
                found |= self.firsts(item)
                if not nullable(item):
                    break
            return found
        if isinstance(node, Choice):
            return set().union(*(self.firsts(option) for option in node.options))
        return self.firsts(node.item) if isinstance(node, Repeat) else set()

    # ---- classes and states ----

    def partition(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
        """The class of each character, and (classes, sets): whether a class lies in a set."""
        asked = asked_codes()
        codes = np.zeros(len(asked), np.uint64)
        for number, members in enumerate(self.sets):
            codes |= members[asked].astype(np.uint64) << np.uint64(number)
        distinct, found = np.unique(codes, return_inverse=True)
        classes = np.zeros(CODE_POINTS, np.uint16)
        classes[asked] = found.reshape(-1)
        bits = distinct[:, None] >> np.arange(len(self.sets), dtype=np.uint64) & np.uint64(1)
        return classes[stands_for()], bits.astype(bool)

    def closure(self, places: list[int], at_start: bool) -> _State:
        """What is reached from ``places`` without reading, up to a match."""
        items: dict[_Item, None] = {}
        seen: set[int] = set()

        def visit(place: int) -> bool:
            """False once the regex has matched: what comes later does not count."""
            if place in seen:
                return True
            seen.add(place)
            step = self.program[place]
            if isinstance(step, _Fork):
                return visit(step.first) and visit(step.second)
            if isinstance(step, _Start):
                return not at_start or visit(step.then)
            if isinstance(step, _Step):
                items[place] = None
            elif isinstance(step, _Wait | _Match):
                items[step] = None
            return not isinstance(step, _Match)

        for place in places:
            if not visit(place):
                break
        return tuple(items)

    def follow(self, state: _State, members: npt.NDArray[np.bool_]) -> _State:
        """The state after a character of a class; ``members`` (sets,): those that it lies in."""
        items: dict[_Item, None] = {}
        for item in state:
            if isinstance(item, int):
                step = self.program[item]
                assert isinstance(step, _Step)
                if members[step.chars]:
                    reached = self.closure([step.then], at_start=False)
                    items.update(dict.fromkeys(reached))
                    if _Match() in reached:
                        break
            elif (
                isinstance(item, _Wait)
                and item.chars is not None
                and bool(members[item.chars]) == item.wanted
            ):
                items[_Late] = None
                break
        return tuple(items)

    def determinize(
        self, start: int, classes: npt.NDArray[np.uint16], members: npt.NDArray[np.bool_]
    ) -> Automaton:
        dead: _State = ()
        first, other = self.closure([start], at_start=True), self.closure([start], at_start=False)
        states: dict[_State, int] = {dead: 0}
        for state in (first, other):
            states.setdefault(state, len(states))
        rows: list[list[int]] = []
        waiting = list(states)
        for state in waiting:  # grows meanwhile
            row = []
            for of_class in members:
                reached = self.follow(state, of_class)
                if reached not in states:
                    states[reached] = len(states)
                    waiting.append(reached)
                    if len(states) > _MOST_STATES:
                        raise self.refused(f"needs more than {_MOST_STATES} states")
                row.append(states[reached])
            rows.append(row)
        accepts = [
            ENDS_HERE if _Match() in s else ENDS_BEFORE if _Late in s else 0 for s in waiting
        ]
        return Automaton(
            classes=classes,
            next=np.array(rows, np.uint16),
            accepts=np.array(accepts, np.uint16),
            at_end=np.array([int(any(map(_at_end, s))) for s in waiting], np.uint16),
            first_start=states[first],
            start=states[other],
        )


def _at_end(item: _Item) -> bool:
    """Whether the end of the text makes it a match: it is there, or it is in no class."""
    return isinstance(item, _Wait) and (item.chars is None or not item.wanted)


def nullable(node: Node) -> bool:
    """Whether it may match no characters."""
    if isinstance(node, Chars):
        return False
    if isinstance(node, Sequence):
        return all(map(nullable, node.items))
    if isinstance(node, Choice):
        return any(map(nullable, node.options))
    if isinstance(node, Repeat):
        return node.least == 0 or nullable(node.item)
    return True


def _looks(node: Node) -> bool:
    if isinstance(node, Sequence):
        return any(map(_looks, node.items))
    if isinstance(node, Choice):
        return any(map(_looks, node.options))
    if isinstance(node, Repeat):
        return _looks(node.item)
    return isinstance(node, Look | TextEnd)
