"""The first of the greatest logits: what greedy sampling chooses, found where the logits are.

Two kernels: parts of the logits, then what these found. The rule is slm_sample's: of equal logits
the first, where zeros of both signs are equal; and no number where some logit is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.vector import LANES, Buffer, Expr

_MOST_PLACES = 1 << 24  # a float32 holds the place of a logit
_VECTORS = 8  # of a part, at least, where there are as many
_MOST_GROUPS = 32  # of 16 parts
_SLOTS = 4  # vectors that are looked at before the first must be there


@dataclass(frozen=True)
class LikeliestOp:
    """Of ``count`` logits."""

    count: int

    @property
    def fits(self) -> bool:
        """Whether these kernels find it: a place must be a float32, and a vector be full."""
        return LANES <= self.count < _MOST_PLACES

    @property
    def parts(self) -> int:
        """A multiple of 16."""
        groups = self.count // (LANES * LANES * _VECTORS)
        return LANES * min(max(groups, 1), _MOST_GROUPS)

    @property
    def part_size(self) -> int:
        """Logits of a part, a multiple of 16: the last ones begin where they end with the logits,
        so that some are looked at twice."""
        return -(-self.count // (self.parts * LANES)) * LANES


def build_parts(op: LikeliestOp) -> Kernel:
    """(logits float32 (count,)) -> greatest, places float32 (parts,): of each part, one block each,
    its greatest logit and where the first of these is."""
    tensors = [
        Tensor("logits", (op.count,), "float32"),
        *(Tensor(name, (op.parts,), "float32") for name in ("greatest", "places")),
    ]

    def body(block: Expr, logits: Buffer, greatest: Buffer, places: Buffer) -> None:
        begin = T.bind(T.min(block * op.part_size, T.int32(op.count - op.part_size)))

        def at(offset: Expr) -> tuple[Expr, Expr]:
            place = T.bind(T.Cast(f"float32x{LANES}", T.ramp(begin + offset, 1, LANES)))
            return vec.load(logits, begin + offset), place

        value, place = _first_greatest(op.part_size, at)
        vec.store(greatest, block, value, 1)
        vec.store(places, block, place, 1)

    return define(
        f"likeliest_parts_v{op.count}", tensors, body, grid=op.parts,
        outputs=["greatest", "places"],
    )  # fmt: skip


def build_chosen(op: LikeliestOp) -> Kernel:
    """(greatest, places) of ``build_parts`` -> chosen float32 (2,): the greatest logit of all, no
    number where one is none, and the place of the first of these."""
    tensors = [
        *(Tensor(name, (op.parts,), "float32") for name in ("greatest", "places")),
        Tensor("chosen", (2,), "float32"),
    ]

    def body(block: Expr, greatest: Buffer, places: Buffer, chosen: Buffer) -> None:
        def at(offset: Expr) -> tuple[Expr, Expr]:
            return vec.load(greatest, offset), vec.load(places, offset)

        value, place = _first_greatest(op.parts, at)
        vec.store(chosen, T.int32(0), value, 1)
        vec.store(chosen, T.int32(1), place, 1)

    return define(f"likeliest_of_p{op.parts}", tensors, body, grid=1, outputs=["chosen"])


def _first_greatest(count: int, at: Callable[[Expr], tuple[Expr, Expr]]) -> tuple[Expr, Expr]:
    """The greatest of ``count`` values, whole vectors, and the least of their places.

    ``at`` gives 16 values and their places; a lane's places must ascend.
    """
    slots = min(_SLOTS, count // LANES)
    best = vec.Accumulators(slots, float("-inf"))
    first = vec.Accumulators(slots)
    watch = vec.NotANumber(slots)

    def look(offset: Expr, _lanes: int, slot: int) -> None:
        value, place = at(offset)
        before = best[slot]
        first[slot] = T.bind(T.Select(value > before, place, first[slot]))
        best[slot] = T.bind(vec.maximum(value, before))
        watch.look(value, slot)

    vec.sweep(count, look, slots)
    greatest = vec.across(best.fold(vec.maximum), vec.maximum)
    for slot in range(slots):
        has = best[slot] == vec.splat(greatest)
        first[slot] = T.bind(T.Select(has, first[slot], vec.splat(float(_MOST_PLACES))))
    place = vec.across(first.fold(vec.minimum), vec.minimum)
    return watch.or_else(greatest), place
