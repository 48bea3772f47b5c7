"""A small canonical decoder with random weights, built by hand, to try passes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, KvSpec

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, CONTEXT = 64, 4, 2, 16, 96, 112, 96


@dataclass(frozen=True)
class Layer:
    """What is particular about the attention of one layer.

    Queries and keys are rotated by the tables of their bases, unless these are 0. ``norm``: RMS
    norms of queries and keys, "heads" each head on its own, "rows" all together, None none;
    ``norm_last``: after the rotation. ``bias_by`` and roundings as ``ir.ops.attention`` has them.
    """

    q_base: float = 10000.0
    k_base: float = 10000.0
    norm: str | None = None
    norm_last: bool = False
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    bias: bool = False
    bias_by: str = "distance"
    roundings: str = ""
    sum_roundings: str = ""
    weight_roundings: str = ""
    gate: Callable[[relax.Expr], relax.Expr] = field(default=relax.op.nn.silu, repr=False)


class _Builder:
    def __init__(self, weight_format: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.format = weight_format
        self.params: dict[str, np.ndarray] = {}
        self.block = relax.BlockBuilder()

    def param(self, name: str, array: np.ndarray) -> relax.Var:
        self.params[name] = array
        return relax.Var(name, relax.TensorType(array.shape, str(array.dtype)))

    def floats(self, name: str, *shape: int) -> relax.Var:
        return self.param(name, self.rng.random(shape).astype("f"))

    def tables(self, base: float) -> tuple[relax.Var, relax.Var]:
        frequencies = base ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
        angles = np.arange(CONTEXT)[:, None] * frequencies
        name = "" if base == Layer().q_base else f"{base:g}"
        cos = self.param(f"cos{name}", np.cos(angles).astype("f"))
        return cos, self.param(f"sin{name}", np.sin(angles).astype("f"))

    def linear(self, name: str, n: int, k: int) -> tuple[dict[str, relax.Var], dict[str, object]]:
        channels = int(self.format.removeprefix("int4-c")) if self.format[:6] == "int4-c" else 0
        if channels:
            weight = self.rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
            scales = self.rng.standard_normal((-(-n // channels), k)).astype("f")
            named = {"weight": weight, "scales": scales * np.float32(0.02)}
            variables = {key: self.param(f"{name}.{key}", a) for key, a in named.items()}
            return variables, {"n": n, "k": k, "format": "int4", "group_channels": channels}
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


def decoder(
    weight_format: str = "int4", layers: int = 2, seed: int = 0, variants: Sequence[Layer] = ()
) -> CanonicalModel:
    """A Llama-like decoder as the importer would make it; ``variants``: its layers, if not equal"""
    b = _Builder(weight_format, seed)
    kinds = tuple(variants) or (Layer(),) * layers
    layers = len(kinds)
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
        name: b.floats(name, DIM)
        for name in [f"{i}.norm{j}" for i in range(layers) for j in (1, 2)] + ["norm"]
    }
    table = b.param("embedding", b.rng.standard_normal((VOCAB, DIM)).astype("f"))
    bases = {base for kind in kinds for base in (kind.q_base, kind.k_base) if base}
    tables = {base: b.tables(base) for base in sorted(bases)}
    gammas, biases = {}, {}
    for i, kind in enumerate(kinds):
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            if kind.norm:
                width = HEAD_DIM if kind.norm == "heads" else heads * HEAD_DIM
                gammas[f"{i}.{name}"] = b.floats(f"{i}.{name}_gamma", width)
        if kind.bias:
            biases[i] = b.floats(f"{i}.bias", HEADS, CONTEXT)

    tokens = relax.Var("tokens", relax.TensorType((tvm.tirx.Var("m", "int64"),), "int32"))
    variables = [v for named, _ in linears.values() for v in named.values()]
    position_tables = [t for pair in tables.values() for t in pair]
    params = [
        *variables, *norms.values(), *gammas.values(), *biases.values(), table, *position_tables
    ]  # fmt: skip
    emit = b.block.emit

    def linear(name: str, x: relax.Var) -> relax.Var:
        named, attrs = linears[name]
        return emit(ops.linear(x, **named, **attrs))

    def place(i: int, name: str, x: relax.Var, heads: int, base: float) -> relax.Var:
        """Queries or keys normed and rotated as the layer has it."""
        kind = kinds[i]

        def norm(x: relax.Var) -> relax.Var:
            groups = heads if kind.norm == "heads" else 1
            return emit(ops.rms_norm(x, gammas[f"{i}.{name}"], eps=1e-6, groups=groups))

        def rotate(x: relax.Var) -> relax.Var:
            return emit(ops.rope(x, *tables[base], num_heads=heads, head_dim=HEAD_DIM))

        steps = [*[norm] * bool(kind.norm), *[rotate] * bool(base)]
        for step in reversed(steps) if kind.norm_last else steps:
            x = step(x)
        return x

    with b.block.function("main", [tokens, *params]):
        with b.block.dataflow():
            x = emit(ops.embedding(tokens, table, dim=DIM, format="f32"))
            for i in range(layers):
                h = emit(ops.rms_norm(x, norms[f"{i}.norm1"], eps=1e-5))
                q, k, v = (linear(f"{i}.{name}", h) for name in "qkv")
                q = place(i, "q", q, HEADS, kinds[i].q_base)
                k = place(i, "k", k, KV_HEADS, kinds[i].k_base)
                a = emit(
                    ops.attention(
                        q, k, v, biases.get(i), layer=i, num_heads=HEADS, num_kv_heads=KV_HEADS,
                        head_dim=HEAD_DIM, scale=HEAD_DIM**-0.5, mask="causal",
                        window=kinds[i].window, chunk=kinds[i].chunk, softcap=kinds[i].softcap,
                        bias_by=kinds[i].bias_by, roundings=kinds[i].roundings,
                        sum_roundings=kinds[i].sum_roundings,
                        weight_roundings=kinds[i].weight_roundings,
                    )
                )  # fmt: skip
                x = emit(relax.op.add(x, linear(f"{i}.o", a)))
                h = emit(ops.rms_norm(x, norms[f"{i}.norm2"], eps=1e-5))
                gate = emit(kinds[i].gate(linear(f"{i}.gate", h)))
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
