"""Covering the graph with steps, from its output backwards.

Each value that is needed is given to the recognisers; the first that knows it says what it is and
which values that needs. Values that nothing needs are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer.faults import located
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.recognise.evidence.regions import evaluate_all
from slmtvm.importer.recognise.steps import (
    Columns,
    Param,
    PositionRows,
    Reordered,
    Rows,
    Step,
    same_step,
)
from slmtvm.importer.rewrite.earlier_tokens import Earlier

Recogniser = Callable[["Cover", Node, str], Step]

_SEED = 0
_SAME_TABLE = 1e-6


@dataclass(frozen=True)
class Weighing:
    """An attention between its two products: values of the graph, in the order of computing.

    ``raw``, products of queries and keys; ``scores``, what the softmax takes; ``softmax``, what it
    gives; ``weights``, what the values are multiplied by. ``of_source``: keys are a source's.
    ``exact``: scores are rounded after a cap or a bias, so that a number that is added to all of a
    row's changes its softmax.
    """

    raw: str
    scores: str
    softmax: str
    weights: str
    of_source: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Root:
    """``value`` is pooled of the rows ``source``: ``how`` is one of ``pooling.POOLS``."""

    value: str
    source: str
    how: str


@dataclass
class Cover:
    """The steps found so far, and what recognisers need to find more."""

    frame: Frame
    tokens: str  # the graph input that holds them
    recognise: Recogniser  # which step makes a value; raises UnsupportedOpError where none does
    segments: str = ""  # the graph input that holds token types, where they are no constants
    earlier: Earlier | None = None  # the graph input that holds the token before each one
    steps: dict[str, Step] = field(default_factory=dict)
    cache: dict[Hashable, object] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(_SEED))
    notes: dict[str, None] = field(default_factory=dict)  # for the model's, each once
    weighings: list[Weighing] = field(default_factory=list)  # of the attentions found
    pools: list[Root] = field(default_factory=list)  # of the pooled outputs found
    _tables: list[Param] = field(default_factory=list)

    def run(self, output: str) -> Rows:
        """Find steps for ``output`` and all that it needs; returns its rows."""
        root = self.need(output)
        self.find(root)
        return root

    def find(self, root: Rows) -> None:
        """Find steps for the rows ``root`` and all that they need."""
        todo, seen = [root], {root}
        while todo:
            rows = todo.pop()
            if rows not in self.steps:
                # Probes may overflow or divide by zero; what is not finite matches nothing.
                with np.errstate(all="ignore"), located(partial(self.frame.where, rows)):
                    self.steps[rows] = self._step(rows)
            fresh = [i for i in self.steps[rows].inputs if i not in seen]
            seen.update(fresh)
            todo.extend(fresh)

    def _step(self, value: str) -> Step:
        node = self.frame.producers.get(value)
        if node is None:
            raise UnsupportedOpError(
                "token ids are used as numbers, not to look up rows",
                where=str(self.frame.graph.path),
            )
        self.frame.rows(value)  # raises where positions are mixed
        return self.recognise(self, node, value)

    def add(self, label: str, step: Step) -> Rows:
        """The rows of a step that a recogniser needs besides the one it was asked about.

        They are called ``label``, or where that is a value of the graph or another step's, that and
        a number.
        """
        rows, count = Rows(label), 1
        while True:
            known = self.steps.get(rows)
            if rows not in self.frame.producers and (known is None or same_step(known, step)):
                self.steps.setdefault(rows, step)
                return rows
            rows, count = Rows(f"{label}.{count}"), count + 1

    def know(self, value: str, step: Step) -> Rows:
        """The rows of a value of the graph, of which a recogniser found that ``step`` makes it."""
        rows = Rows(value)
        self.steps.setdefault(rows, step)
        return rows

    def note(self, text: str) -> None:
        """Tell users of something that was not recognised or is changed, and what it costs."""
        self.notes[text] = None

    def source(self, value: str) -> tuple[str, bool]:
        """What ``value`` is moved from, and whether it holds the same features in order."""
        source, features = self.moved(value)
        width = self.frame.features(source)
        return source, features.size == width and bool((features == np.arange(width)).all())

    def need(self, value: str) -> Rows:
        """The rows of ``value``, to be found; data movement is looked through."""
        source, features = self.moved(value)
        return self.columns(source, features)

    def part(self, value: str, begin: int, end: int) -> Rows:
        """Features ``begin`` to ``end`` of the rows of ``value``, to be found."""
        source, features = self.moved(value)
        return self.columns(source, features[begin:end])

    def columns(self, source: str, features: Array) -> Rows:
        """Some features of the rows of ``source``, which are to be found."""
        width = self.frame.features(source)
        begin = int(features[0])
        if (features != np.arange(begin, begin + features.size)).any():
            label = ",".join(map(str, features))
            order = Param(f"{source}.order", features.astype(np.int32))
            return self.add(f"{source}#{label}", Reordered(Rows(source), order))
        if features.size == width:
            return Rows(source)
        end = begin + features.size
        return self.add(f"{source}#{begin}:{end}", Columns(Rows(source), begin, end))

    def moved(self, value: str) -> tuple[str, Array]:
        """The value that ``value`` is moved from, and which feature of it each feature is."""
        trace = self.frame.trace(value)
        if trace.source == value:
            return value, np.arange(self.frame.features(value))
        elements = trace.index.reshape(-1)[self.frame.rows(value)]
        _, features = self.frame.places(trace.source, elements)
        if (features != features[:1]).any():
            raise UnsupportedOpError(
                f"{value!r} takes other features at other positions", where=self.frame.where(value)
            )
        return trace.source, features[0]

    def width(self, value: str) -> int | None:
        """Features of a row of ``value``, or None where it does not lie in rows of tokens."""
        try:
            self.frame.token_axis(value)
            return self.frame.features(value)
        except SlmError:
            return None

    def probe(self, nodes: Sequence[Node], x: str, value: str, rows: Array) -> Array | None:
        """``value``'s rows when ``x`` has these rows; None where that cannot be computed."""
        frame, found = self.frame, []
        for start in range(0, len(rows), frame.small.length):
            values = self.probe_all(nodes, x, rows[start : start + frame.small.length])
            result = None if values is None else self.rows_of(values, value)
            if result is None:
                return None
            found.append(result)
        return np.concatenate(found)

    def probe_all(self, nodes: Sequence[Node], x: str, rows: Array) -> dict[str, Array] | None:
        """All values of ``nodes`` when ``x`` has these rows; None where that cannot be computed."""
        try:
            return evaluate_all(self.frame.small, nodes, {x: self.frame.from_rows(x, rows)})
        except InvalidModelError:
            return None

    def rows_of(self, values: Mapping[str, Array], value: str) -> Array | None:
        """The rows of ``value`` among probed ``values``; None where it has others."""
        frame, result = self.frame, values[value]
        if result.shape != frame.small.shapes[value] or result.dtype.kind != "f":
            return None
        return frame.to_rows(value, result, frame.small.length)

    def vector(self, name: str, size: int, factor: float, where: str) -> Param:
        """A constant as float32 (size,), times ``factor``."""
        constant = self.frame.small.constants.get(name)
        if constant is None:
            raise UnsupportedOpError(f"operand {name!r} must be a constant", where=where)
        values = constant.values()
        if values.size not in (1, size):
            raise InvalidModelError(
                f"operand {name!r} has shape {list(values.shape)} where {size} values are needed",
                where=where,
            )
        flat = values.reshape(-1).astype(np.float32, copy=False)
        flat = np.broadcast_to(flat, (size,)) if flat.size != size else flat
        return Param(constant.name, flat if factor == 1.0 else flat * np.float32(factor))

    def constant_operand(self, name: str, value: str) -> Rows | Param | float:
        """A constant operand of the elementwise op that makes ``value``.

        A number, a feature vector, or where it changes with the position the rows of a table.
        """
        frame = self.frame
        constant = frame.small.constants[name]
        small = np.broadcast_to(constant.values(), frame.small.shapes[value])
        by_token = frame.to_rows(value, small, frame.small.length)
        # What depends on the length may be the same for the first positions only.
        fixed = frame.full.constants[name] is constant
        if fixed and (by_token == by_token[:1, :1]).all():
            return float(by_token[0, 0])
        if fixed and (by_token == by_token[:1]).all():
            vector = by_token[0]
            own = constant.stored.reshape(-1)
            if constant.plain and own.size == vector.size and (own == vector).all():
                vector = own  # the file's own array, not a copy
            return Param(constant.name, vector.astype(np.float32, copy=False))
        full = np.broadcast_to(
            frame.full.constants[name].values(table=True), frame.full.shapes[value]
        )
        table = frame.to_rows(value, full, frame.full.length)
        if (table == table[:1, :1]).all():
            return float(table[0, 0])
        if (table == table[:1]).all():
            return Param(constant.name, table[0].astype(np.float32, copy=False))
        if not np.allclose(table[: len(by_token)], by_token, rtol=_SAME_TABLE, atol=_SAME_TABLE):
            raise UnsupportedOpError(
                f"operand {name!r} changes with the sequence length, not only with the position",
                where=frame.where(value),
            )
        step = PositionRows(Param(constant.name, table.astype(np.float32, copy=False)))
        return self.add(f"{name}#rows", step)

    def table(self, name: str, array: Array) -> Param:
        """A position table; equal ones are shared."""
        for known in self._tables:
            if known.array.shape == array.shape and np.allclose(
                known.array, array, rtol=0, atol=_SAME_TABLE
            ):
                return known
        self._tables.append(Param(name, array))
        return self._tables[-1]
