"""Row kernels: the prologue's and the epilogue's code put together."""

from __future__ import annotations

from slmtvm.schedules.kernel import Kernel, define
from slmtvm.schedules.rows.epilogue import EPILOGUE_CODE
from slmtvm.schedules.rows.op import RowOp
from slmtvm.schedules.rows.prologue import PROLOGUE_CODE
from slmtvm.schedules.vector import Buffer, Expr


def build(op: RowOp) -> Kernel:
    """The kernel of ``op``: tensors op.inputs, op.outputs, op.scratch; a block is a row's part."""
    tensors = (*op.inputs, *op.outputs, *op.scratch)

    def body(row: Expr, *arguments: Buffer) -> None:
        buffers = {t.name: a for t, a in zip(tensors, arguments, strict=True)}
        value = PROLOGUE_CODE[op.prologue](op, row, buffers)
        EPILOGUE_CODE[op.epilogue](op, row, buffers, value)

    return define(
        op.name, tensors, body, grid=op.m * op.groups, outputs=[t.name for t in op.outputs]
    )
