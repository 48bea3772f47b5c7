"""Writes ONNX graphs node by node, and runs them in onnxruntime."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from slmtvm.verify.exact_sums import exact_session

OPSET = 18


@dataclass
class GraphBuilder:
    """Collects nodes and constants; every method returns the name of a value."""

    random: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs) -> str:
        return self.ops(kind, *inputs, outputs=outputs, domain=domain, **attrs)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, domain: str = "", **attrs) -> list[str]:
        index = len(self.nodes)
        names = [f"{kind}_{index}_{i}" for i in range(outputs)]
        node = helper.make_node(
            kind, list(inputs), names, name=f"{kind}_{index}", domain=domain, **attrs
        )
        self.nodes.append(node)
        return names

    def constant(self, value, dtype=np.float32, name: str = "") -> str:
        array = np.asarray(value, dtype)
        if not name:
            name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weight(self, *shape: int, name: str = "") -> str:
        scale = 1 / math.sqrt(shape[0])
        return self.constant(self.random.normal(size=shape) * scale, name=name)

    def near(self, centre: float, *shape: int, name: str = "") -> str:
        return self.constant(centre + 0.2 * self.random.normal(size=shape), name=name)

    def model(self, inputs, outputs) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "test", inputs, outputs,
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def save(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def run_onnxruntime(path: Path, tokens: np.ndarray, output: str | None = None) -> np.ndarray:
    """The first (or the named) output of one sequence without a past, the graph not optimised."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = exact_session(path, options)
    feed = {}
    for port in session.get_inputs():
        shape = [d if isinstance(d, int) else 0 for d in port.shape]
        if port.name.startswith("past"):
            batch = 1 if len(shape) == 5 else 0  # keys and values in one are (2, batch, ...)
            shape[batch] = 1
            feed[port.name] = np.zeros(shape, np.float32)
        elif port.name == "input_ids":
            dtype = np.int32 if port.type == "tensor(int32)" else np.int64
            feed[port.name] = np.asarray(tokens, dtype)[None]
        elif port.name == "position_ids":
            feed[port.name] = np.arange(len(tokens))[None]
        elif port.type == "tensor(bool)":
            feed[port.name] = np.zeros(shape, np.bool_)
        else:
            fill = 1 if "mask" in port.name else 0
            dtype = np.int32 if port.type == "tensor(int32)" else np.int64
            feed[port.name] = np.full((1, len(tokens)), fill, dtype)
    chosen = output or session.get_outputs()[0].name
    return session.run([chosen], feed)[0][0]


def insert_after(model: onnx.ModelProto, value: str, write) -> None:
    """Whoever reads ``value`` reads what the nodes of ``write(before, after)`` make of it."""
    graph = model.graph
    place = next(i for i, node in enumerate(graph.node) if value in node.output)
    producer, before = graph.node[place], f"{value}_before"
    producer.output[list(producer.output).index(value)] = before
    for offset, node in enumerate(write(before, value)):
        graph.node.insert(place + 1 + offset, node)
