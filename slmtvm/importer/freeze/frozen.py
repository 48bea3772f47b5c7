"""What is known of each value of a graph for one sequence of fixed length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmtvm.importer.graph import Constant, Graph, Node
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of

Shape = tuple[int, ...]


@dataclass
class Frozen:
    """``graph`` for batch 1 and ``length`` tokens.

    A value is in ``constants``, or it depends on the tokens: then ``shapes`` and ``dtypes`` have
    it, or ``broken`` says why its shape cannot be known. ``of_sequence`` are the constants that
    follow from its length, or from inputs such as its mask.
    """

    graph: Graph
    length: int
    constants: dict[str, Constant] = field(default_factory=dict)
    of_sequence: set[str] = field(default_factory=set)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)  # node -> length at which its table may end
    max_elements: int = 0  # of one constant
    before: Graph | None = None  # the graph before attentions were written in squares, where any is

    @property
    def original(self) -> Graph:
        """The graph that was frozen."""
        return self.graph if self.before is None else self.before

    def is_lookup(self, node: Node) -> bool:
        """Whether ``node`` picks rows of a constant table by a value that depends on tokens."""
        if operator_of(node).kind is Kind.LOOKUP:
            return True
        return (
            node.op_type in ("Gather", "GatherND")
            and node.inputs[0] in self.constants
            and node.inputs[1] not in self.constants
        )

    def shape(self, name: str) -> Shape | None:
        """The shape of a value; None for an input that is left out."""
        if not name:
            return None
        constant = self.constants.get(name)
        return self.shapes[name] if constant is None else constant.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of a value."""
        constant = self.constants.get(name)
        return self.dtypes[name] if constant is None else constant.dtype
