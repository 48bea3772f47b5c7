"""How many features each layer keeps of those that all may keep together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from slmtvm.ir.model import KvSpec

_LINE = 16  # floats that a row's outputs are whole lines of, so that sessions run together
_STEPS = 8  # ranks that are tried of a head


def allocated(
    kv: Sequence[KvSpec], num_heads: int, rank: int, cost: Callable[[int, int], float]
) -> list[int]:
    """The rank of each layer, ``rank`` in the mean over kv heads or a little less.

    ``cost`` of a layer and a rank: what the layer loses, 0 for whole heads. Step by step the layer
    gives up features that loses least by it, of those that all still have; a rank too low for
    steps is every layer's.
    """
    costs = cache(lambda layer, left: 0.0 if left == kv[layer].head_dim else cost(layer, left))
    left = [spec.head_dim for spec in kv]
    budget = sum(spec.num_kv_heads * min(rank, spec.head_dim) for spec in kv)
    while sum(spec.num_kv_heads * n for spec, n in zip(kv, left, strict=True)) > budget:
        found = []
        for layer, spec in enumerate(kv):
            step = step_of(spec.head_dim, num_heads)
            less = left[layer] - step
            if less > 0:
                more = costs(layer, less) - costs(layer, left[layer])
                found.append((more / (step * spec.num_kv_heads), layer, less))
        if not found:
            return [min(rank, spec.head_dim) for spec in kv]
        _, layer, left[layer] = min(found)
    return left


def step_of(head_dim: int, num_heads: int) -> int:
    """Features by which ranks of heads of ``head_dim`` differ: an even number, since int4 has pairs
    of them, that keeps rows of ``num_heads`` in whole lines."""
    unit = math.lcm(2, _LINE // math.gcd(num_heads, _LINE))
    return unit * max(1, math.ceil(head_dim / _STEPS / unit))
