"""What TVM's analyzer makes of a kernel stays small: it writes bound values out at each use."""

from __future__ import annotations

from typing import Any

import pytest
from tvm import tirx

from slmtvm.schedules import rows
from slmtvm.schedules.rows.op import RowOp
from tests.schedules.test_rows import row_op

_PARTS = ("a", "b", "args", "value", "vectors", "condition", "true_value", "false_value", "base")
_MOST = 3000  # nodes; 87,000 took a second a kernel


def largest_written_out(func: tirx.PrimFunc) -> int:
    """Nodes of the largest value that ``func`` binds, those of what it is made of included."""
    sizes: dict[Any, int] = {}

    def size(value: Any) -> int:
        nodes, left = 0, [value]
        while left:
            node = left.pop()
            nodes += 1
            kind = type(node).__name__
            if kind == "Var":
                nodes += sizes.get(node, 0)
            elif kind != "BufferLoad":  # into buffers it does not look
                for part in (getattr(node, name, None) for name in _PARTS):
                    if isinstance(part, (type(None), int, float, str)):
                        continue
                    left.extend([part] if hasattr(part, "ty") else part)
        return nodes

    def walk(statement: Any) -> None:
        if isinstance(statement, tirx.SeqStmt):
            for each in statement.seq:
                walk(each)
        elif isinstance(statement, tirx.Bind):
            sizes[statement.var] = size(statement.value)
        elif hasattr(statement, "body"):
            walk(statement.body)

    walk(func.body)
    assert len(sizes) > 20
    return max(sizes.values())


@pytest.mark.parametrize(
    "op",
    [
        row_op("copy", "row_u8", 256, k_multiple=64),
        row_op("rms_norm", "row_u8", 256, keep_f32=True),
        row_op("silu_glu", "row_u8", 256),
        row_op("layer_norm", "block", 256),
    ],
    ids=lambda op: f"{op.prologue}-{op.epilogue}",
)
def test_what_a_row_kernel_binds_is_small_written_out(op: RowOp) -> None:
    assert largest_written_out(rows.build(op).func) < _MOST
