"""Outputs of the whole sequence: one row that is pooled of all rows, and what follows from it.

A pooling is found by what it computes: the part of the graph between rows of tokens and a value is
given numbers, and what comes out is compared with each known pooling, at two lengths. What comes
after it is a graph of its own, of one row, on which the recognisers work as on rows of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover, Root
from slmtvm.importer.recognise.evidence.regions import evaluate
from slmtvm.importer.recognise.steps import Pool, Rows, Step, resolve

# Of rows and their places in the sequence.
POOLS: dict[str, Callable[[Array, Array], Array]] = {
    "first": lambda x, at: x[0],
    "last": lambda x, at: x[-1],
    "mean": lambda x, at: x.mean(axis=0),
    "weightedmean": lambda x, at: (at + 1) @ x / (at + 1).sum(),
    "max": lambda x, at: x.max(axis=0),
}
_SEED = 0
_TOLERANCE = 1e-6
_MAX_NODES = 60  # of one pooling; real ones have a dozen
_SAMPLES = 7  # rows that recognisers try
_THROUGH = (Kind.MOVE, Kind.ELEMENTWISE, Kind.REDUCE, Kind.CONTRACT, Kind.SCATTER)


class PooledFrame(Frame):
    """What follows from pooled rows: every value is one row, in its own order."""

    roots: frozenset[str] = frozenset()

    @property
    def samples(self) -> int:
        return _SAMPLES

    @cached_property
    def producers(self) -> dict[str, Node]:
        inside = {o: n for n in self.graph.nodes for o in n.outputs if o in self.small.shapes}
        return {value: node for value, node in inside.items() if value not in self.roots}

    @cached_property
    def tokens(self) -> dict[str, Array]:
        return {value: np.zeros(shape, np.int32) for value, shape in self.small.shapes.items()}

    def token_axis(self, value: str) -> tuple[int, int, int]:
        return 0, 1, 1  # the batch

    def to_rows(self, value: str, array: Array, length: int) -> Array:
        return array.reshape(1, -1)

    def from_rows(self, value: str, rows: Array) -> Array:
        return rows.reshape(self.small.shapes[value])


def cover_pooled(cover: Cover, output: str, roots: Sequence[Root]) -> Rows:
    """Find steps for an output that follows from pooled ``roots``, and for all that it needs;
    returns its row."""
    for root in roots:
        cover.know(root.value, Pool(cover.run(root.source), root.how))
        if root not in cover.pools:
            cover.pools.append(root)
    row = replace(cover, frame=pooled_frame(cover.frame, roots), cache={})
    return row.run(output)


def pooled_steps(steps: Mapping[str, Step], order: Sequence[str]) -> set[str]:
    """Of steps in their ``order``, those that are one row."""
    found: set[str] = set()
    for name in order:
        inputs = [resolve(steps, i) for i in steps[name].inputs]
        if isinstance(steps[name], Pool) or not found.isdisjoint(inputs):
            found.add(name)
    return found


def find_roots(frame: Frame, output: str) -> tuple[Root, ...]:
    """The pooled values that ``output`` follows from.

    Raises UnsupportedOpError where it follows from several tokens in another way.
    """
    found: dict[str, Root] = {}
    todo, seen = [output], {output}
    while todo:
        value = todo.pop()
        if has_rows(frame, value):
            raise UnsupportedOpError(
                f"output {output!r} follows from rows of tokens ({value!r}) in a way that is none "
                f"of {', '.join(POOLS)} over all of them",
                where=frame.where(value),
            )
        root = _match_pool(frame, value)
        if root is not None:
            found[value] = root
            continue
        node = frame.producers.get(value)
        fresh = [] if node is None else [i for i in frame.dynamic(node) if i not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return tuple(found.values())


def has_rows(frame: Frame, value: str) -> bool:
    """Whether ``value`` has a row for each token."""
    try:
        frame.token_axis(value)
        return True
    except SlmError:
        return False


def pooled_frame(frame: Frame, roots: Sequence[Root]) -> PooledFrame:
    """The part of ``frame``'s graph that follows from ``roots`` alone."""
    inside = {root.value for root in roots}
    for node in frame.graph.nodes:
        dynamic = frame.dynamic(node)
        if dynamic and inside.issuperset(dynamic):
            inside.update(o for o in node.outputs if o in frame.small.shapes)

    def part(frozen: Frozen) -> Frozen:
        shapes = {name: shape for name, shape in frozen.shapes.items() if name in inside}
        return replace(frozen, length=1, shapes=shapes)

    result = PooledFrame(part(frame.small), part(frame.full))
    result.roots = frozenset(root.value for root in roots)
    return result


def _match_pool(frame: Frame, value: str) -> Root | None:
    """``value`` as a pooling of the nearest rows that it follows from, or of what they are where
    each is weighed by its place."""
    region = _region(frame, value)
    if region is None or frame.small.dtypes[value].kind != "f":
        return None
    root = _as_pool(frame, value, *region)
    weighing = frame.producers.get(region[0])
    if root is None and weighing is not None and weighing.op_type == "Mul":
        dynamic = frame.dynamic(weighing)
        if len(dynamic) == 1 and dynamic[0] in frame.small.shapes:
            root = _as_pool(frame, value, dynamic[0], [weighing, *region[1]])
    return root


def _as_pool(frame: Frame, value: str, source: str, nodes: list[Node]) -> Root | None:
    """``value``, which ``nodes`` make of rows ``source``, as a pooling of them."""
    width = int(np.prod(frame.small.shapes[value], dtype=np.int64))
    if frame.small.dtypes[source].kind != "f" or frame.features(source) != width:
        return None
    names = set(POOLS)
    random = np.random.default_rng(_SEED)
    for frozen in (frame.small, frame.full):
        rows = random.normal(size=(frozen.length, width))
        got = pooled_by(frame, frozen, nodes, source, value, rows)
        at = np.arange(frozen.length)
        names = {n for n in names if got is not None and _same(got, POOLS[n](rows, at))}
        if not names:
            return None
    return Root(value, source, min(names))


def pooled_by(
    frame: Frame, frozen: Frozen, nodes: Sequence[Node], source: str, value: str, rows: Array
) -> Array | None:
    """``value``, flat, where ``source`` has these rows; None where that cannot be computed."""
    try:
        found = evaluate(frozen, nodes, {source: frame.from_rows(source, rows)}, value)
    except (InvalidModelError, KeyError):
        return None
    return found.reshape(-1) if found.size == rows.shape[1] else None


def _same(found: Array, expected: Array) -> bool:
    return bool(np.abs(found - expected).max() <= _TOLERANCE * np.abs(expected).max())


def _region(frame: Frame, value: str) -> tuple[str, list[Node]] | None:
    """The one value with rows that ``value`` follows from, and the nodes between them."""
    places: set[int] = set()
    sources: set[str] = set()
    todo = [value]
    while todo:
        name = todo.pop()
        node = frame.producers.get(name)
        if node is None or operator_of(node).kind not in _THROUGH:
            return None
        places.add(frame.order[name])
        for given in frame.dynamic(node):
            if given in frame.small.broken or given not in frame.small.shapes:
                return None
            if has_rows(frame, given):
                sources.add(given)
            elif frame.order.get(given, -1) not in places:
                todo.append(given)
        if len(places) > _MAX_NODES or len(sources) > 1:
            return None
    if len(sources) != 1:
        return None
    return sources.pop(), [frame.graph.nodes[place] for place in sorted(places)]
