"""Values of a model's parameters, of which some are put together only when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Stack:
    """One array (experts, n, ...) of matrices that lie apart: of each expert, parts along n.

    All experts' parts have the same shapes and dtype.
    """

    experts: tuple[tuple[np.ndarray, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.experts[0]
        return (len(self.experts), sum(len(part) for part in own), *own[0].shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.experts[0][0].dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def pieces(self) -> list[np.ndarray]:
        """The matrices, in order."""
        return [part for own in self.experts for part in own]

    def of_expert(self, index: int) -> np.ndarray:
        """One expert's (n, ...)."""
        own = self.experts[index]
        return own[0] if len(own) == 1 else np.concatenate(own)

    def assembled(self) -> np.ndarray:
        """The array, new each time."""
        whole = np.empty(self.shape, self.dtype)
        for expert, own in enumerate(self.experts):
            at = 0
            for part in own:
                whole[expert, at : at + len(part)] = part
                at += len(part)
        return whole

    @staticmethod
    def of(value: np.ndarray | Stack) -> Stack:
        """``value`` (experts, n, ...) as one."""
        return value if isinstance(value, Stack) else Stack(tuple((own,) for own in value))

    @staticmethod
    def side_by_side(stacks: Sequence[Stack]) -> Stack:
        """Of each expert all that the ``stacks`` have, along n."""
        by_expert = zip(*(s.experts for s in stacks), strict=True)
        return Stack(tuple(tuple(part for own in parts for part in own) for parts in by_expert))

    @staticmethod
    def joined(stacks: Sequence[Stack]) -> Stack:
        """The experts of all ``stacks``."""
        return Stack(tuple(own for s in stacks for own in s.experts))


Value = np.ndarray | Stack

# What functions call their input and the state: names that no parameter may have beside them.
_NO_VALUE = re.compile(r"tokens|hidden|limits|(layer|source)\d+\.\w+|conv\d+")


def same_value(a: Value, b: Value) -> bool:
    """Whether both hold the same bytes in one shape and dtype."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (
        np.ascontiguousarray(v.assembled() if isinstance(v, Stack) else v) for v in (a, b)
    )
    return bool((left.reshape(-1).view(np.uint8) == right.reshape(-1).view(np.uint8)).all())


class Params(MutableMapping[str, np.ndarray]):
    """Arrays by name. A Stack is assembled whenever it is read, and not kept."""

    def __init__(self, values: Mapping[str, Value] | None = None) -> None:
        self._values: dict[str, Value] = {}
        if values is not None:
            self._values.update(values._values if isinstance(values, Params) else values)

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._values[name]
        return value.assembled() if isinstance(value, Stack) else value

    def __setitem__(self, name: str, value: Value) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def only(self, names: Collection[str]) -> Params:
        """Those of these names."""
        return Params({name: value for name, value in self._values.items() if name in names})

    def put(self, label: str, value: Value) -> str:
        """The name under which ``value`` is from now on: ``label``, or where that holds another
        value, or is none that a value may have, ``label`` and a number.

        So whoever puts the same value under the same label shares it, and nobody gets another.
        """
        name, count = label, 1
        while _NO_VALUE.fullmatch(name) or name in self._values:
            if name in self._values and same_value(self._values[name], value):
                return name
            name, count = f"{label}.{count}", count + 1
        self._values[name] = value
        return name

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; none is assembled."""
        return sum(value.nbytes for value in self._values.values())
