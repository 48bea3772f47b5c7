"""Row kernels whose grid is the blocks of a row: for processors with more units than rows.

Bits are those of ``template.build``: blocks are quantized on their own there, too, and what a norm
has to know of the whole row is computed by a kernel of its own.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.schedules.rows.epilogue import quantize_block
from slmtvm.schedules.rows.op import NORMS, RowOp
from slmtvm.schedules.rows.prologue import PROLOGUE_CODE, norm_statistics, norm_value
from slmtvm.schedules.vector import Buffer, Expr

STATISTICS = "statistics"
"""The tensor, float32 (m, 1 or 2), that one kernel leaves for the other."""


def can_build(op: RowOp) -> bool:
    """Whether there are kernels for it here."""
    return op.epilogue == "block" and not op.residual


def has_statistics(op: RowOp) -> bool:
    """Whether ``build_blocks`` reads what ``build_statistics`` makes."""
    return op.prologue in NORMS


def build_statistics(op: RowOp) -> Kernel:
    """A norm's statistics: op.inputs -> statistics. A block is a row."""
    tensors, count = (*op.inputs, _statistics(op)), _count(op)

    def body(row: Expr, *arguments: Buffer) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=True)}
        for i, value in enumerate(norm_statistics(op, row, buffers)):
            vec.store(buffers[STATISTICS], row * count + i, value, 1)

    name = f"{op.name}_statistics"
    return define(name, tensors, body, grid=op.m, outputs=[STATISTICS])


def build_blocks(op: RowOp) -> Kernel:
    """op.inputs, of norms then statistics -> op.outputs. A block is a block of a row."""
    given = (_statistics(op),) if has_statistics(op) else ()
    tensors, count = (*op.inputs, *given, *op.outputs), _count(op)
    full, rest = divmod(op.d, op.group_size)

    def body(index: Expr, *arguments: Buffer) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=True)}
        row, block = T.bind(index // op.blocks), T.bind(index % op.blocks)

        def quantize(width: int) -> None:
            if has_statistics(op):
                known = tuple(
                    vec.load(buffers[STATISTICS], row * count + i, 1) for i in range(count)
                )
                value = norm_value(op, row, buffers, known)
            else:
                value = PROLOGUE_CODE[op.prologue](op, row, buffers)
            quantize_block(op, row, block, width, buffers, value)

        if not rest:
            quantize(op.group_size)
            return
        if full:
            with T.If(block < full), T.Then():
                quantize(op.group_size)
        with T.If(block == full), T.Then():
            quantize(rest)

    return define(
        f"{op.name}_blocks", tensors, body, grid=op.m * op.blocks,
        outputs=[t.name for t in op.outputs],
    )  # fmt: skip


def _count(op: RowOp) -> int:
    return 2 if op.prologue == "layer_norm" else 1


def _statistics(op: RowOp) -> Tensor:
    return Tensor(STATISTICS, (op.m, _count(op)), "float32")
