"""Encoders like BERT with random weights of which most are zero, as SparseML exports them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH, HEADS, VOCAB, MOST_TOKENS, OPSET = 6, 384, 12, 4096, 128, 13
_INPUT_SCALE, _INPUT_ZERO = 0.05, 128  # of the activations of int8 layers, which are static


class _Writer:
    """Nodes and initializers, named as they come."""

    def __init__(self, zeros: float, along_k: int, int8: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.zeros, self.along_k, self.int8 = zeros, along_k, int8
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{name}.node", **attributes))
        return name

    def weight(self, k: int, n: int) -> np.ndarray:
        """Floats (k, n); the smallest runs of ``along_k`` are zero."""
        weight = self.rng.standard_normal((k, n)).astype(np.float32) / np.float32(np.sqrt(k))
        size = np.abs(weight).reshape(-1, self.along_k, n).sum(axis=1)
        kept = size > np.quantile(size, self.zeros)
        return weight * np.repeat(kept, self.along_k, axis=0)

    def linear(self, x: str, k: int, n: int) -> str:
        weight = self.weight(k, n)
        bias = self.constant(0.02 * self.rng.standard_normal(n))
        if not self.int8:
            return self.op("Add", self.op("MatMul", x, self.constant(weight)), bias)
        scale = float(np.abs(weight).max()) / 127
        zero = self.constant(_INPUT_ZERO, np.uint8)
        rounded = self.op("QuantizeLinear", x, self.constant(_INPUT_SCALE), zero)
        integers = self.constant(np.round(weight / scale), np.int8)
        product = self.op("MatMulInteger", rounded, integers, zero, self.constant(0, np.int8))
        floats = self.op("Cast", product, to=TensorProto.FLOAT)
        return self.op("Add", self.op("Mul", floats, self.constant(_INPUT_SCALE * scale)), bias)

    def norm(self, x: str) -> str:
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        squares = self.op("Pow", centred, self.constant(2.0))
        variance = self.op("Add", self.op("ReduceMean", squares, axes=[-1]), self.constant(1e-12))
        scaled = self.op("Div", centred, self.op("Sqrt", variance))
        gamma, beta = self.constant(np.ones(WIDTH)), self.constant(np.zeros(WIDTH))
        return self.op("Add", self.op("Mul", scaled, gamma), beta)

    def heads(self, x: str, perm: list[int]) -> str:
        shape = self.constant([1, -1, HEADS, WIDTH // HEADS], np.int64)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=perm)

    def attention(self, x: str) -> str:
        q, k, v = (
            self.heads(self.linear(x, WIDTH, WIDTH), perm)
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = self.op("Div", self.op("MatMul", q, k), self.constant((WIDTH // HEADS) ** 0.5))
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        flat = self.constant([1, -1, WIDTH], np.int64)
        joined = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), flat)
        return self.norm(self.op("Add", self.linear(joined, WIDTH, WIDTH), x))

    def feed_forward(self, x: str) -> str:
        up = self.linear(x, WIDTH, 4 * WIDTH)
        erf = self.op("Erf", self.op("Div", up, self.constant(2**0.5)))
        gate = self.op("Mul", up, self.op("Add", erf, self.constant(1.0)))
        gelu = self.op("Mul", gate, self.constant(0.5))
        return self.norm(self.op("Add", self.linear(gelu, 4 * WIDTH, WIDTH), x))

    def embedded(self) -> str:
        words = self.constant(self.rng.standard_normal((VOCAB, WIDTH)))
        table = self.constant(0.1 * self.rng.standard_normal((1, MOST_TOKENS, WIDTH)))
        zero, one, two = (self.constant([i], np.int64) for i in range(3))
        length = self.op("Slice", self.op("Shape", "input_ids"), one, two)
        positions = self.op("Slice", table, zero, length, one)
        return self.norm(self.op("Add", self.op("Gather", words, "input_ids"), positions))


def write_pruned_encoder(
    path: Path, *, zeros: float, along_k: int = 1, int8: bool = False
) -> Path:  # fmt: skip
    """An encoder of LAYERS layers, WIDTH wide; ``zeros`` of the weights of each linear layer are
    zero, in runs of ``along_k`` inputs of a channel. float32, or int8 on rounded activations."""
    b = _Writer(zeros, along_k, int8)
    x = b.embedded()
    for _ in range(LAYERS):
        x = b.feed_forward(b.attention(x))
    b.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"]))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    rows = helper.make_tensor_value_info(
        "last_hidden_state", TensorProto.FLOAT, [1, "tokens", WIDTH]
    )
    graph = helper.make_graph(b.nodes, "encoder", [ids], [rows], b.constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
    )  # fmt: skip
    onnx.save(model, str(path))
    return path
