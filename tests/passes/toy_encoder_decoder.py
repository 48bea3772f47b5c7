"""A small canonical encoder-decoder with random weights, built by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, KvSpec

DIM, HEADS, HEAD_DIM, VOCAB, CONTEXT, SOURCE_CONTEXT, LAYERS = 40, 3, 24, 61, 50, 37, 2
WIDTH = HEADS * HEAD_DIM


class _Function:
    """One function of tokens; its weights go to ``arrays``."""

    def __init__(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        self.arrays, self.rng = arrays, rng
        self.params: list[relax.Var] = []
        self.tokens = relax.Var("tokens", relax.TensorType((tvm.tirx.Var("m", "int64"),), "int32"))
        self.steps: list[relax.Expr] = []

    def param(self, name: str, *shape: int) -> relax.Var:
        if name not in self.arrays:
            scale = 1 / np.sqrt(shape[-1])
            self.arrays[name] = self.rng.normal(size=shape).astype(np.float32) * np.float32(scale)
        var = relax.Var(name, relax.TensorType(shape, "float32"))
        self.params.append(var)
        return var


def encoder_decoder(seed: int = 0) -> CanonicalModel:
    """``source``: one layer, then keys and values for both layers of ``main``."""
    arrays: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(seed)
    functions = {name: build(_Function(arrays, rng)) for name, build in _BUILDERS.items()}
    return CanonicalModel(
        tvm.IRModule(functions), arrays, "encoder-decoder", "toy", CONTEXT, VOCAB, DIM, HEADS,
        tuple(KvSpec(HEADS, HEAD_DIM) for _ in range(LAYERS)), Path("toy.onnx"),
        source_context=SOURCE_CONTEXT,
    )  # fmt: skip


def _source(f: _Function) -> relax.Function:
    names = {"table": (VOCAB, DIM), "e.norm": (DIM,), "e.o": (DIM, WIDTH)}
    names |= {f"e.{part}": (WIDTH, DIM) for part in "qkv"}
    names |= {f"{i}.cross.{part}": (WIDTH, DIM) for i in range(LAYERS) for part in "kv"}

    def body(b: relax.BlockBuilder, p: dict[str, relax.Var]) -> relax.Var:
        x = b.emit(ops.embedding(f.tokens, p["table"], dim=DIM, format="f32"))
        q, k, v = (_project(b, p[f"e.{part}"], x, WIDTH) for part in "qkv")
        a = b.emit(
            ops.attention(
                q, k, v, layer=0, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM,
                scale=HEAD_DIM**-0.5, mask="bidirectional",
            )
        )  # fmt: skip
        x = b.emit(relax.op.add(x, _project(b, p["e.o"], a, DIM)))
        x = b.emit(ops.rms_norm(x, p["e.norm"], eps=1e-5))
        for i in range(LAYERS):
            k, v = (_project(b, p[f"{i}.cross.{part}"], x, WIDTH) for part in "kv")
            x = b.emit(ops.remember(x, k, v, layer=i, num_kv_heads=HEADS, head_dim=HEAD_DIM))
        return x

    return _function(f, "source", names, body)


def _main(f: _Function) -> relax.Function:
    names = {"table": (VOCAB, DIM), "norm": (DIM,), "head": (VOCAB, DIM)}
    for i in range(LAYERS):
        names |= {f"{i}.{part}": (WIDTH, DIM) for part in ("q", "k", "v", "cross.q")}
        names |= {f"{i}.{part}": (DIM, WIDTH) for part in ("o", "cross.o")}

    def body(b: relax.BlockBuilder, p: dict[str, relax.Var]) -> relax.Var:
        x = b.emit(ops.embedding(f.tokens, p["table"], dim=DIM, format="f32"))
        sizes = {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}
        for i in range(LAYERS):
            q, k, v = (_project(b, p[f"{i}.{part}"], x, WIDTH) for part in "qkv")
            a = b.emit(ops.attention(q, k, v, layer=i, scale=0.2, mask="causal", **sizes))
            x = b.emit(relax.op.add(x, _project(b, p[f"{i}.o"], a, DIM)))
            q = _project(b, p[f"{i}.cross.q"], x, WIDTH)
            a = b.emit(ops.cross_attention(q, layer=i, scale=0.3, **sizes))
            x = b.emit(relax.op.add(x, _project(b, p[f"{i}.cross.o"], a, DIM)))
        x = b.emit(ops.rms_norm(x, p["norm"], eps=1e-5))
        return _project(b, p["head"], x, VOCAB)

    return _function(f, "main", names, body)


def _project(b: relax.BlockBuilder, weight: relax.Var, x: relax.Var, n: int) -> relax.Var:
    return b.emit(ops.linear(x, weight, n=n, k=int(x.ty.shape[1]), format="f32"))


def _function(f: _Function, name: str, shapes, body) -> relax.Function:
    params = {key: f.param(key, *shape) for key, shape in shapes.items()}
    builder = relax.BlockBuilder()
    with builder.function(name, [f.tokens, *f.params]):
        with builder.dataflow():
            output = builder.emit_output(body(builder, params))
        builder.emit_func_output(output)
    return builder.get()[name]


_BUILDERS = {"source": _source, "main": _main}
