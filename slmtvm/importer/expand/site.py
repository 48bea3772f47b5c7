"""Where one composite node stands: what is known of its inputs, and the nodes written for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.freeze.frozen import Frozen, Shape
from slmtvm.importer.graph import Array, Constant, Node

_OPSET = 20  # of the nodes written
_MICROSOFT_VERSION = 1


class Site:
    """What an expansion reads and writes.

    Sizes are those of one sequence at a short length: feature sizes and ranks are true of every
    length, lengths are not, and must be taken from Shape nodes.
    """

    def __init__(
        self, frozen: Frozen, node: Node, tokens: str, place: Callable[[Node], None]
    ) -> None:
        self._frozen = frozen
        self._tokens = tokens
        self._place = place
        self._count = 0
        self.node = node
        self.attrs = node.attrs

    @property
    def where(self) -> str:
        return self._frozen.graph.where(self.node)

    def input(self, index: int) -> str:
        """The name of an input, "" where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else ""

    def wants(self, index: int) -> bool:
        """Whether anything can read output ``index``."""
        return index < len(self.node.outputs) and bool(self.node.outputs[index])

    def shape(self, name: str) -> Shape:
        """The shape of a value; raises UnsupportedOpError where it depends on token values."""
        self._check_known(name)
        constant = self._frozen.constants.get(name)
        return self._frozen.shapes[name] if constant is None else constant.shape

    def is_shaped(self, name: str) -> bool:
        """Whether the shape of a value is known: it does not depend on token values."""
        return name not in self._frozen.broken

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        self._check_known(name)
        constant = self._frozen.constants.get(name)
        return self._frozen.dtypes[name] if constant is None else constant.dtype

    def _check_known(self, name: str) -> None:
        if not self.is_shaped(name):
            raise UnsupportedOpError(
                f"what it stands for depends on the shape of its input {name!r}, which is not "
                f"known: {self._frozen.broken[name]}",
                where=self.where,
            )

    def known(self, name: str) -> bool:
        """Whether the value does not depend on the tokens."""
        return name in self._frozen.constants

    def values(self, index: int, default: float = 0) -> Array | None:
        """An input that is known beforehand, ``default`` where it is absent; None for others."""
        if not self.input(index):
            return np.asarray(default)
        constant = self._frozen.constants.get(self.input(index))
        return None if constant is None else constant.values()

    def op(
        self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any
    ) -> Any:
        """Write a node; its output's name, or with several ``outputs`` a list of them."""
        base = f"{self.node.name or self.node.outputs[0]}/{op_type}.{self._count}"
        self._count += 1
        names = [base] if outputs == 1 else [f"{base}.{i}" for i in range(outputs)]
        version = _MICROSOFT_VERSION if domain else _OPSET
        self._place(Node(domain, op_type, version, base, inputs, tuple(names), attrs))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A new constant."""
        array: Array = np.asarray(value, dtype)
        return str(self.op("Constant", value=Constant.of("value", array)))

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def size(self, name: str, axis: int) -> str:
        """A dimension of a value as an int64 vector of one element.

        The sequence length is read off the tokens: so all layers share what is computed from it.
        """
        if self.shape(name)[axis] == self._frozen.length:
            name, axis = self._tokens, 1
        return str(self.op("Shape", name, start=axis, end=axis + 1))

    def refuse(self, what: str) -> UnsupportedOpError:
        """The error for a variant of the operator that is not written out."""
        return UnsupportedOpError(f"{what} is not supported", where=self.where)

    def invalid(self, fault: str) -> InvalidModelError:
        """The error for inputs or attributes that contradict each other."""
        return InvalidModelError(fault, where=self.where)
