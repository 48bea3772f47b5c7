"""A small canonical decoder with random weights, built by hand, to try passes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, KvSpec

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, CONTEXT = 64, 4, 2, 16, 96, 112, 96


class _Builder:
    def __init__(self, weight_format: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.format = weight_format
        self.params: dict[str, np.ndarray] = {}
        self.block = relax.BlockBuilder()

    def param(self, name: str, array: np.ndarray) -> relax.Var:
        self.params[name] = array
        return relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))

    def linear(self, name: str, n: int, k: int) -> tuple[dict[str, relax.Var], dict[str, object]]:
        if self.format == "int4":
            weight = self.rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
            scales = self.rng.standard_normal((n, k // 32)).astype("f") * np.float32(0.02)
            arrays = {"weight": weight, "scales": scales}
        elif self.format == "int8":
            weight = self.rng.integers(-127, 128, (n, k), dtype=np.int8)
            arrays = {"weight": weight, "scales": np.full(1, 0.002, np.float32)}
        else:
            arrays = {"weight": self.rng.standard_normal((n, k)).astype("f") * np.float32(0.1)}
        variables = {key: self.param(f"{name}.{key}", a) for key, a in arrays.items()}
        group = 32 if self.format == "int4" else 0
        return variables, {"n": n, "k": k, "format": self.format, "group_size": group}


def decoder(weight_format: str = "int4", layers: int = 2, seed: int = 0) -> CanonicalModel:
    """A Llama-like decoder as the importer would make it."""
    b = _Builder(weight_format, seed)
    sizes = {
        "q": (HEADS * HEAD_DIM, DIM), "k": (KV_HEADS * HEAD_DIM, DIM),
        "v": (KV_HEADS * HEAD_DIM, DIM), "o": (DIM, HEADS * HEAD_DIM),
        "gate": (FFN, DIM), "up": (FFN, DIM), "down": (DIM, FFN),
    }  # fmt: skip
    linears = {
        f"{i}.{name}": b.linear(f"{i}.{name}", *size)
        for i in range(layers)
        for name, size in sizes.items()
    }
    linears["head"] = b.linear("head", VOCAB, DIM)
    norms = {
        name: b.param(name, b.rng.random(DIM).astype("f"))
        for name in [f"{i}.norm{j}" for i in range(layers) for j in (1, 2)] + ["norm"]
    }
    table = b.param("embedding", b.rng.standard_normal((VOCAB, DIM)).astype("f"))
    frequencies = 10000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
    angles = np.arange(CONTEXT)[:, None] * frequencies
    cos = b.param("cos", np.cos(angles).astype("f"))
    sin = b.param("sin", np.sin(angles).astype("f"))

    tokens = relax.Var("tokens", relax.TensorType((tvm.tirx.Var("m", "int64"),), "int32"))
    variables = [v for named, _ in linears.values() for v in named.values()]
    params = [*variables, *norms.values(), table, cos, sin]
    emit = b.block.emit

    def linear(name: str, x: relax.Var) -> relax.Var:
        named, attrs = linears[name]
        return emit(ops.linear(x, **named, **attrs))

    with b.block.function("main", [tokens, *params]):
        with b.block.dataflow():
            x = emit(ops.embedding(tokens, table, dim=DIM, format="f32"))
            for i in range(layers):
                h = emit(ops.rms_norm(x, norms[f"{i}.norm1"], eps=1e-5))
                q, k, v = (linear(f"{i}.{name}", h) for name in "qkv")
                q = emit(ops.rope(q, cos, sin, num_heads=HEADS, head_dim=HEAD_DIM))
                k = emit(ops.rope(k, cos, sin, num_heads=KV_HEADS, head_dim=HEAD_DIM))
                a = emit(
                    ops.attention(
                        q, k, v, layer=i, num_heads=HEADS, num_kv_heads=KV_HEADS,
                        head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5, mask="causal",
                    )
                )  # fmt: skip
                x = emit(relax.op.add(x, linear(f"{i}.o", a)))
                h = emit(ops.rms_norm(x, norms[f"{i}.norm2"], eps=1e-5))
                gate = emit(relax.op.nn.silu(linear(f"{i}.gate", h)))
                h = emit(relax.op.multiply(gate, linear(f"{i}.up", h)))
                x = emit(relax.op.add(x, linear(f"{i}.down", h)))
            x = emit(ops.rms_norm(x, norms["norm"], eps=1e-5))
            output = b.block.emit_output(linear("head", x))
        b.block.emit_func_output(output)
    by_name = {v.name: b.params[v.name] for v in params}
    return CanonicalModel(
        b.block.get(), by_name, "decoder", "llama", CONTEXT, VOCAB, DIM, HEADS,
        tuple(KvSpec(KV_HEADS, HEAD_DIM) for _ in range(layers)), Path("toy.onnx"),
    )  # fmt: skip
