"""What each kind of linear kernel offers: a module of the kind has these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slmtvm.schedules.isa import Isa
from slmtvm.schedules.isa.base import Buffer
from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace
from slmtvm.schedules.linear.shape import LinearShape
from slmtvm.schedules.linear.tile import Store, Tile


@dataclass(frozen=True)
class Weights:
    """The weights of a layer, as ``slm.linear`` has them."""

    weight: np.ndarray
    scales: np.ndarray | None = None
    zero_points: np.ndarray | None = None


class Scheme(Protocol):
    """A format of weights on a format of activations: how it is packed, computed, and meant."""

    def activations(self, shape: LinearShape, isa: Isa) -> list[Tensor]:
        """What the kernel takes of the rows that it multiplies."""

    def weight_tensors(self, shape: LinearShape, isa: Isa) -> list[Tensor]:
        """The packed weights."""

    def pack(self, shape: LinearShape, isa: Isa, weights: Weights) -> list[np.ndarray]:
        """The arrays of ``weight_tensors``."""

    def emit(
        self, shape: LinearShape, knobs: Knobs, tile: Tile, named: Mapping[str, Buffer],
        store: Store,
    ) -> None:  # fmt: skip
        """The code of one tile; ``named`` are the buffers of activations and packed weights."""

    def knob_space(self, shape: LinearShape, isa: Isa) -> KnobSpace:
        """Settings that can be worth a try."""

    def default_knobs(self, shape: LinearShape, isa: Isa) -> Knobs:
        """The setting used where nothing was tuned."""

    def operands(
        self, shape: LinearShape, activations: Sequence[np.ndarray], weights: Weights
    ) -> tuple[np.ndarray, np.ndarray]:
        """Dequantized x (m, k) and W (n, k) in float64: the kernel computes ``x @ W.T``."""
