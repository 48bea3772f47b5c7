"""Features that go together: what makes them, computes on each for itself, and reads them.

Between linear layers that make features and those that read them stand activations, gates and
products with constants, where each feature meets only itself; an attention makes features too,
those of a head together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from slmtvm.importer.emit.emit import schedule
from slmtvm.importer.recognise.steps import (
    Attention,
    Elementwise,
    Embedding,
    Linear,
    Param,
    QuantizeDequantize,
    Step,
    resolve,
)
from slmtvm.ir.model import Structure

_PART = re.compile(r"(.*)\[(\d+):\d+\]")  # what ``split_packed`` calls some outputs of a layer


@dataclass
class Region:
    """Features of one ``width``, with the steps that make them, compute on them and read them."""

    width: int
    makers: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


class Regions:
    """The regions of a function's ``steps``, which may be replaced by others of the same names."""

    def __init__(self, steps: Mapping[str, Step], outputs: Sequence[str]) -> None:
        self.steps = steps
        self.order = schedule(steps, outputs)
        self._ends = {resolve(steps, output) for output in outputs}
        self._users: dict[str, list[str]] = defaultdict(list)
        self._tables = set()
        for name in self.order:
            step = steps[name]
            for rows in dict.fromkeys(resolve(steps, i) for i in step.inputs):
                self._users[rows].append(name)
            if isinstance(step, Embedding):
                self._tables.add(id(step.table.weight.value))

    def found(self) -> Iterator[Region]:
        """All regions, in order."""
        done: set[str] = set()
        for name in self.order:
            step = self.steps[name]
            if not isinstance(step, Linear) or name in done:
                continue
            region = self.region(resolve(self.steps, step.x), step.k)
            if region is not None:
                done.update(region.readers)
                yield region

    def is_private(self, rows: str, reader: str) -> bool:
        """Whether nothing but ``reader`` reads ``rows``, or the weight of the layer behind."""
        return (
            self._users[rows] == [reader]
            and rows not in self._ends
            and not self._is_table(self.steps[rows])
        )

    def region(self, start: str, width: int) -> Region | None:
        """The features that ``start`` has; None where something else reads or makes them."""
        region = Region(width)
        seen, waiting = {start}, [start]
        while waiting:
            name = waiting.pop()
            step = self.steps[name]
            near: list[str] = []
            if name in self._ends:
                return None
            if isinstance(step, (Linear, Attention)):
                if _width(step) != width or self._is_table(step):
                    return None
                region.makers.append(name)
            elif isinstance(step, (Elementwise, QuantizeDequantize)):
                near += [resolve(self.steps, i) for i in step.inputs]
                if not by_feature(step, width):
                    return None
                region.between.append(name)
            else:
                return None
            for user in self._users[name]:
                if isinstance(self.steps[user], Linear):
                    region.readers.append(user)
                else:
                    near.append(user)
            waiting += [other for other in near if other not in seen]
            seen.update(near)
        region.readers = [n for n in self.order if n in set(region.readers)]
        if any(self._is_table(self.steps[n]) for n in region.readers):
            return None
        return region

    def _is_table(self, step: Step) -> bool:
        return isinstance(step, Linear) and id(step.weights.weight.value) in self._tables


def structures(steps: Mapping[str, Step], outputs: Sequence[str]) -> tuple[Structure, ...]:
    """What can be pruned as a whole: heads with their keys, and channels inside of blocks."""
    found = []
    for region in Regions(steps, outputs).found():
        attentions = [s for n in region.makers if isinstance(s := steps[n], Attention)]
        linears = [s for n in region.makers if isinstance(s := steps[n], Linear)]
        unit, own, kind = 1, 1, "channels"
        if attentions:
            (attention, *others) = attentions
            values = steps[resolve(steps, attention.v)]
            if others or linears or not isinstance(values, Linear):
                continue
            kind, linears, own = "heads", [values], attention.head_dim
            unit = own * (attention.num_heads // attention.num_kv_heads)
        makers = [_maker(linear, own) for linear in linears]
        for name in region.readers:
            reader = steps[name]
            assert isinstance(reader, Linear)
            weight = reader.weights.weight.name
            known = tuple(maker for maker in makers if maker is not None)
            if len(known) == len(makers) and not _PART.fullmatch(weight):
                found.append(Structure(kind, weight, unit, known))
    return tuple(found)


def _maker(linear: Linear, outputs: int) -> tuple[str, int, int, str] | None:
    """The layer as ``Structure`` has it; None where its outputs lie apart in the file."""
    name, begin = linear.weights.weight.name, 0
    if part := _PART.fullmatch(name):
        name, begin = part[1], int(part[2])
    bias = "" if linear.bias is None else linear.bias.name
    if part := _PART.fullmatch(bias):
        bias = part[1]
    return None if "[" in name or "[" in bias else (name, begin, outputs, bias)


def _width(step: Linear | Attention) -> int:
    return step.n if isinstance(step, Linear) else step.num_heads * step.head_dim


def by_feature(step: Elementwise | QuantizeDequantize, width: int) -> bool:
    """Whether constants are single numbers or one for each feature."""
    if isinstance(step, QuantizeDequantize):
        return True
    shapes = [o.value.shape for o in step.operands if isinstance(o, Param)]
    return all(shape in ((), (1,), (width,), (1, width)) for shape in shapes)
