"""The modules behind a sentence-transformer's graph as nodes of it: its embedding as an output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from slmtvm.embedding_modules import EMBEDDING, ROWS, Dense, LayerNorm, Modules
from slmtvm.errors import InvalidModelError
from slmtvm.importer.graph import Array, Constant, Graph, Node, Port

_FLOAT = 1  # of onnx's element types
_OPSET = 20  # that the nodes are of, whatever the file's are
_MASK = "attention_mask"
_HIDDEN = -1e9  # in the place of hidden rows, where the greatest is looked for
_OPERATORS = {"Tanh": "Tanh", "ReLU": "Relu", "GELU": "Gelu", "Sigmoid": "Sigmoid"}


def with_embedding(graph: Graph, modules: Modules) -> Graph:
    """``graph`` with the output EMBEDDING, which ``modules`` make of its rows of tokens; as it is
    where it has none, or an embedding of its own.

    Raises InvalidModelError where a layer does not fit what comes before it.
    """
    outputs = {port.name: port for port in graph.outputs}
    rows = next((name for name in ROWS if name in outputs), None)
    if rows is None or EMBEDDING in outputs or len(outputs[rows].dims or ()) != 3:
        return graph
    writer = _Writer(graph)
    masked = any(port.name == _MASK for port in graph.inputs)
    x = writer.pooled(rows, modules.pooling, masked)
    width = (outputs[rows].dims or ())[2]
    for layer in modules.layers:
        needed = layer.weight.shape[-1]
        if isinstance(width, int) and width != needed:
            raise InvalidModelError(
                f"the modules beside the model do not fit it: a layer takes {needed} features, and "
                f"gets {width}",
                where=str(graph.path),
            )
        x, width = writer.layer(x, layer), len(layer.weight)
    if modules.normalize:
        x = writer.op("LpNormalization", x, axis=1, p=2)
    writer.op("Identity", x, output=EMBEDDING)
    return replace(
        graph,
        nodes=(*graph.nodes, *writer.nodes),
        outputs=(*graph.outputs, Port(EMBEDDING, _FLOAT, (None, width))),
        initializers={**graph.initializers, **writer.constants},
    )


@dataclass
class _Writer:
    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, output: str = "", **attrs: object) -> str:
        """A node; the name of its value."""
        name = output or f"{EMBEDDING}#{len(self.nodes)}"
        self.nodes.append(Node("", kind, _OPSET, name, inputs, (name,), attrs))
        return name

    def constant(self, value: Array) -> str:
        name = f"{EMBEDDING}.{len(self.constants)}"
        self.constants[name] = Constant.of(name, value)
        return name

    def pooled(self, rows: str, how: str, masked: bool) -> str:
        along, zero = self.constant(np.array([1], np.int64)), self.constant(np.array(0.0, "f4"))
        if how in ("first", "last"):
            place = self.constant(np.array(0 if how == "first" else -1, np.int64))
            return self.op("Gather", rows, place, axis=1)
        if not masked and how in ("mean", "max"):
            kind = "ReduceMean" if how == "mean" else "ReduceMax"
            return self.op(kind, rows, along, keepdims=0)
        seen = self.op("Cast", _MASK, to=_FLOAT) if masked else ""
        if how == "max":
            hidden = self.op("Equal", self.column(seen), zero)
            shown = self.op("Where", hidden, self.constant(np.array(_HIDDEN, "f4")), rows)
            return self.op("ReduceMax", shown, along, keepdims=0)
        weights = self.column(self.weights(rows, how, seen))
        total = self.op("ReduceSum", self.op("Mul", rows, weights), along, keepdims=0)
        return self.op("Div", total, self.op("ReduceSum", weights, along, keepdims=0))

    def weights(self, rows: str, how: str, seen: str) -> str:
        """What each row weighs in a mean, float32 (batch, length)."""
        if how == "mean":
            return seen
        first, one = (self.constant(np.array(n, np.int64)) for n in ([0], 1))
        size = self.op("Gather", self.op("Shape", rows), one, axis=0)
        places = self.op("Range", one, self.op("Add", size, one), one)
        weights = self.op("Unsqueeze", self.op("Cast", places, to=_FLOAT), first)
        return self.op("Mul", weights, seen) if seen else weights

    def column(self, x: str) -> str:
        return self.op("Unsqueeze", x, self.constant(np.array([2], np.int64)))

    def layer(self, x: str, layer: Dense | LayerNorm) -> str:
        weight, bias = self.constant(layer.weight), self.constant(layer.bias)
        if isinstance(layer, LayerNorm):
            return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=layer.eps)
        y = self.op("Gemm", x, weight, bias, transB=1)
        kind = _OPERATORS.get(layer.activation)
        return y if kind is None else self.op(kind, y)
