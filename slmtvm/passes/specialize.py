"""body and head -> body_M and head_M for a few numbers of rows, all shapes static.

They become batch_M and batchhead_M, too, whose rows are tokens of so many sessions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import tvm
from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.exits import exit_index
from slmtvm.passes.rewrite import function_names
from slmtvm.plan.setup import CHUNKS

DECODER_HEAD_ROWS = (1, 16)
# A number more makes compiling a sixth longer; fewer sessions leave rows empty.
BATCH_ROWS = (4,)
ENCODER_BODY_ROWS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Specialize:
    """Binds the number of rows m: of a decoder's body those of ``chunks``; an encoder gets a
    function for each sequence-length bucket."""

    chunks: tuple[int, ...] = CHUNKS

    name = "specialize"

    def apply(self, model: CanonicalModel) -> CanonicalModel:
        functions = {}
        for name in function_names(model.module):
            function = model.module[name]
            (m,) = [
                d for d in function.params[0].ty.shape.values if not isinstance(d, tvm.tirx.IntImm)
            ]
            for label, rows in _labels(model, name, self.chunks):
                bound = function.bind_symbolic_vars({m: rows})
                functions[label] = bound.with_attr("global_symbol", label)
        return replace(model, module=relax.transform.Normalize()(tvm.IRModule(functions)))


def _labels(model: CanonicalModel, name: str, chunks: tuple[int, ...]) -> list[tuple[str, int]]:
    """What ``name`` becomes, each for a number of rows."""
    if exit_index(name) >= 0:
        return [(f"{name}_1", 1)]
    rows = _rows(model, name, chunks)
    labels = [(f"{name}_{r}", r) for r in rows]
    if model.kind == "encoder" or name == "source" or model.exits:
        return labels  # a token that may end early takes its turn
    # The memory that a session computes in is that of its body.
    most = max(_rows(model, "body", chunks))
    batch = {"body": "batch", "head": "batchhead"}[name]
    return labels + [(f"{batch}_{r}", r) for r in BATCH_ROWS if r <= most]


def _rows(model: CanonicalModel, name: str, chunks: tuple[int, ...]) -> list[int]:
    if model.kind == "encoder" or name == "source":
        most = model.source_context if name == "source" else model.context
        return [*(r for r in ENCODER_BODY_ROWS if r < most), most]
    bodies = [r for r in chunks if r <= model.context]
    # Head reads rows that body left.
    return bodies if name == "body" else [r for r in DECODER_HEAD_ROWS if r <= max(bodies)]
