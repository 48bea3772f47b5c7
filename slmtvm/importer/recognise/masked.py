"""A graph frozen a second time, under a mask that hides some of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.freeze.freeze import freeze
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.roles import MASK, Roles
from slmtvm.importer.graph import Array, Constant, Graph, Node
from slmtvm.importer.recognise.cover import Cover

_SEED = 0
_HIDDEN_OF_MANY = 0.25  # the share of hidden tokens in a long sequence
_LONG = 16  # tokens


@dataclass(frozen=True)
class Probe:
    """One function of a file, without a mask (``cover``) and under one.

    ``masked``: short and long, frozen under ``masks``. The masks hide rows and keys, or where
    ``of_source`` the keys of cross-attentions alone.
    """

    cover: Cover
    outputs: tuple[str, ...]
    masked: tuple[Frozen, Frozen]
    masks: tuple[Array, Array]
    of_source: bool = False

    @property
    def frame(self) -> Frame:
        return self.cover.frame

    @cached_property
    def plain(self) -> tuple[Frozen, Frozen]:
        return self.frame.small, self.frame.full

    @cached_property
    def needed(self) -> list[Node]:
        """The nodes that the outputs are computed by and that depend on tokens, in order."""
        frame, nodes = self.frame, self.frame.graph.nodes
        found: set[int] = set()
        todo = list(self.outputs)
        while todo:
            place = frame.order.get(todo.pop(), -1)
            if place >= 0 and place not in found:
                found.add(place)
                todo.extend(i for i in nodes[place].inputs if i and not self.is_constant(i))
        return [nodes[place] for place in sorted(found)]

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on the mask and the length alone."""
        return name not in self.frame.small.shapes and name not in self.frame.small.broken


def sample_mask(length: int) -> Array:
    """Which of ``length`` tokens are visible, bool: hidden at both ends, and holes between."""
    visible = np.ones(length, bool)
    if length > _LONG:
        visible = np.random.default_rng(_SEED).random(length) >= _HIDDEN_OF_MANY
        visible[: length // _LONG] = False
        visible[length // _LONG] = True
    visible[[0, length // 2]] = False
    visible[-1] = length < 6
    return visible


def under_mask(
    frame: Frame, roles: Roles, tests: Sequence[str] = ()
) -> tuple[tuple[Frozen, Frozen], tuple[Array, Array]]:
    """``frame``'s graph frozen under masks of both lengths, and these.

    ``tests``: values that say which tokens are padding; hidden tokens are. Raises
    UnsupportedOpError where the graph cannot be frozen so.
    """
    found: list[tuple[Frozen, Array]] = []
    for length in (frame.small.length, frame.full.length):
        mask = sample_mask(length)
        padded = {name: Constant.of(name, ~mask[None]) for name in tests}
        found.append(
            (freeze(_given(frame.small.original, padded), roles.under(mask), length), mask)
        )
    (small, short), (full, long) = found
    return (small, full), (short, long)


def after_mask(
    frame: Frame, roles: Roles, constants: Mapping[str, Constant]
) -> tuple[Frozen, Frozen]:
    """A decoder's graph frozen with those ``constants`` of its source that a mask changes."""
    graph = _given(frame.small.original, constants)
    return freeze(graph, roles, frame.small.length), freeze(graph, roles, frame.full.length)


def _given(graph: Graph, constants: Mapping[str, Constant]) -> Graph:
    nodes = tuple(n for n in graph.nodes if not constants.keys() & set(n.outputs))
    return replace(graph, nodes=nodes, initializers={**graph.initializers, **constants})


def check_mask_input(graph: Graph, roles: Roles) -> None:
    """Raise where the file takes no mask."""
    if not any(role == MASK for role, _ in roles.fixed.values()):
        raise UnsupportedOpError(
            "no input is a mask of the tokens (attention_mask); export the model with one",
            where=str(graph.path),
        )
