"""A small canonical decoder of experts and causal convolutions with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.relax.op import nn

from slmtvm.ir import ops
from slmtvm.ir.experts import ExpertLayer, Gate, Routing, moe
from slmtvm.ir.model import CanonicalModel

DIM, FFN, SHARED, VOCAB, CONTEXT, TAPS = 72, 40, 56, 101, 300, 3  # not multiples of 16
GROUP = 32


class Weights:
    """Makes parameters of one format, and keeps their values."""

    def __init__(self, weight_format: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.format = weight_format
        self.params: dict[str, np.ndarray] = {}
        self.variables: list[relax.Var] = []

    def param(self, name: str, array: np.ndarray) -> relax.Var:
        self.params[name] = array
        self.variables.append(relax.Var(name, relax.TensorType(array.shape, str(array.dtype))))
        return self.variables[-1]

    def floats(self, name: str, *shape: int, scale: float = 1.0) -> relax.Var:
        return self.param(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def matrix(self, name: str, n: int, k: int, *lead: int) -> dict[str, relax.Var]:
        """The operands of a linear layer, or of a stack of them."""
        rng, spread = self.rng, 1.5 / np.sqrt(k)
        if self.format == "f32":
            return {"weight": self.floats(f"{name}.weight", *lead, n, k, scale=spread)}
        if self.format == "int8":
            weight = rng.integers(-127, 128, (*lead, n, k), dtype=np.int8)
            scales = rng.random((*lead, n)).astype(np.float32) * np.float32(spread / 64)
            arrays = {"weight": weight, "scales": scales}
        else:
            groups = -(-k // GROUP)
            weight = rng.integers(0, 256, (*lead, n, -(-k // 2)), dtype=np.uint8)
            scales = rng.random((*lead, n, groups)).astype(np.float16).astype(np.float32)
            zeros = rng.integers(4, 12, (*lead, n, groups), dtype=np.uint8)
            arrays = {"weight": weight, "scales": scales * np.float32(0.0625), "zero_points": zeros}
        return {key: self.param(f"{name}.{key}", a) for key, a in arrays.items()}

    def levels(self, name: str, experts: int) -> relax.Var:
        """Scales and ends of roundings to 8 bits, for each expert."""
        scale, low = self.rng.uniform(0.01, 0.03, experts), -self.rng.integers(100, 156, experts)
        table = np.stack([scale, low, low + 255], axis=1)
        return self.param(name, table.astype(np.float32))

    def layer(self, n: int, k: int) -> ExpertLayer:
        activation = {"f32": "f32", "int8": "row_u8", "int4": "block"}[self.format]
        return ExpertLayer(n, k, self.format, activation, GROUP if self.format == "int4" else 0)


def decoder(
    weight_format: str = "f32",
    *,
    routing: Routing | None = None,
    gate: Gate | None = None,
    biased: bool = False,
    rounded: Sequence[str] = (),
    seed: int = 0,
) -> CanonicalModel:
    """tokens -> gated convolution -> experts and a shared one with its own gate -> head.

    ``rounded``: points of the experts that are rounded, each with scales of its own.
    """
    w = Weights(weight_format, seed)
    routing, gate = routing or Routing(5, 2, normalize="sum"), gate or Gate("swiglu")
    experts = routing.experts
    b = relax.BlockBuilder()
    tokens = relax.Var("tokens", relax.TensorType((tvm.tirx.Var("m", "int64"),), "int32"))
    table = w.floats("embedding", VOCAB, DIM)
    norms = [w.floats(f"norm{i}", DIM) for i in range(3)]
    conv = w.floats("conv", TAPS, DIM, scale=0.5)
    router = w.floats("router", experts, DIM, scale=0.2)
    up_n = 2 * FFN if gate.activation == "swiglu" else FFN
    matrices = {name: w.matrix(name, DIM, DIM) for name in ("b", "c", "v")}
    up = w.matrix("experts.up", up_n, DIM, experts)
    down = w.matrix("experts.down", DIM, FFN, experts)
    bias = w.floats("selection", experts, scale=0.1) if biased else None
    if biased:
        up["bias"] = w.floats("up.bias", experts, up_n)
        down["bias"] = w.floats("down.bias", experts, DIM)
    roundings = {point: w.levels(f"{point}.levels", experts) for point in rounded}
    shared = {
        "gate": w.matrix("shared.gate", SHARED, DIM), "up": w.matrix("shared.up", SHARED, DIM),
        "down": w.matrix("shared.down", DIM, SHARED),
    }  # fmt: skip
    shared_gate = w.floats("shared_gate", 1, DIM, scale=0.2)
    head = w.matrix("head", VOCAB, DIM)

    def linear(operands: dict[str, relax.Var], n: int, k: int, x: relax.Var) -> relax.Var:
        layer = w.layer(n, k)
        return b.emit(
            ops.linear(
                x, **operands, n=n, k=k, format=layer.format, activation=layer.activation,
                group_size=layer.group_size,
            )
        )  # fmt: skip

    def plain(weight: relax.Var, n: int, x: relax.Var) -> relax.Var:
        return b.emit(ops.linear(x, weight, n=n, k=DIM, format="f32"))

    with b.function("main", [tokens, *w.variables]):
        with b.dataflow():
            x = b.emit(ops.embedding(tokens, table, dim=DIM, format="f32"))
            h = b.emit(ops.rms_norm(x, norms[0], eps=1e-5))
            parts = {name: linear(m, DIM, DIM, h) for name, m in matrices.items()}
            inner = b.emit(relax.op.multiply(parts["b"], parts["v"]))
            mixed = b.emit(ops.causal_conv(inner, conv, layer=0))
            x = b.emit(relax.op.add(x, b.emit(relax.op.multiply(parts["c"], mixed))))
            h = b.emit(ops.rms_norm(x, norms[1], eps=1e-5))
            routed = b.emit(
                moe(
                    h, plain(router, experts, h), up, down, routing=routing, gate=gate,
                    up_layer=w.layer(up_n, DIM), down_layer=w.layer(DIM, FFN), selection_bias=bias,
                    roundings=roundings,
                )
            )  # fmt: skip
            silu = b.emit(nn.silu(linear(shared["gate"], SHARED, DIM, h)))
            product = b.emit(relax.op.multiply(silu, linear(shared["up"], SHARED, DIM, h)))
            own = linear(shared["down"], DIM, SHARED, product)
            weight = b.emit(relax.op.sigmoid(plain(shared_gate, 1, h)))
            total = b.emit(relax.op.add(routed, b.emit(relax.op.multiply(own, weight))))
            x = b.emit(relax.op.add(x, total))
            x = b.emit(ops.rms_norm(x, norms[2], eps=1e-5))
            output = b.emit_output(linear(head, VOCAB, DIM, x))
        b.emit_func_output(output)
    return CanonicalModel(
        b.get(), w.params, "decoder", "toy", CONTEXT, VOCAB, DIM, 1, (), Path("toy.onnx")
    )
