"""What greedy sampling chooses, found on the GPU: launches behind those of a head of one row."""

from __future__ import annotations

from dataclasses import dataclass

from slmtvm.codegen.cuda.nodes import Node, single
from slmtvm.codegen.cuda.translate import translate
from slmtvm.plan.model import Function, Plan, Ref, Space
from slmtvm.schedules.likeliest import LikeliestOp, build_chosen, build_parts

_ALIGNMENT = 64  # bytes
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Choosing:
    """The launches, and where they leave what they find, behind what the plan knows of: the parts'
    in the arena, and two floats, the greatest logit and its place, in the outputs."""

    nodes: list[Node]
    parts: tuple[Ref, Ref]
    chosen: Ref

    @staticmethod
    def of(plan: Plan) -> Choosing | None:
        """None where nothing is sampled, or these kernels cannot find it."""
        op = LikeliestOp(plan.vocab_size)
        sampled = plan.kind != "encoder" and plan.output_size == plan.vocab_size
        if not sampled or plan.exits or plan.outputs[0].offset or not op.fits:
            return None
        size = op.parts * _FLOAT
        begin = _aligned(plan.arena_bytes)
        greatest = Ref(Space.ARENA, begin, size)
        places = Ref(Space.ARENA, begin + _aligned(size), size)
        logits = Ref(Space.OUTPUT, 0, plan.vocab_size * _FLOAT)
        chosen = Ref(Space.OUTPUT, _aligned(plan.output_bytes), 2 * _FLOAT)
        given = (
            (build_parts(op), (logits, greatest, places)),
            (build_chosen(op), (greatest, places, chosen)),
        )
        nodes = [
            single(
                translate(f"kernel_{kernel.func.attrs['global_symbol']}", kernel.func, (), False),
                refs,
                kernel.grid,
            )
            for kernel, refs in given
        ]
        return Choosing(nodes, (greatest, places), chosen)

    @property
    def arena_bytes(self) -> int:
        """Of the plan's arena and the parts."""
        return max(_aligned(ref.offset + ref.size) for ref in self.parts)


def chooses(function: Function) -> bool:
    """Whether the launches follow those of ``function``."""
    return function.name == "head" and function.rows == 1


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
