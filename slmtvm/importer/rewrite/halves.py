"""Graphs in half precision: what they compute in float16 or bfloat16 is compiled as float32.

Constants keep their bits. Casts to half precision go, and what is computed from constants is
computed in float32, so that nothing is rounded that the constants' own bits do not round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from slmtvm.importer.graph import EXPAND_LIMIT, Array, Graph, Node, Port, Subgraph

_HALVES = {
    int(code): np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code))
    for code in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
}


def widen(graph: Graph) -> Graph:
    """``graph`` with float32 for half precision, but for its constants."""
    return replace(
        graph,
        nodes=tuple(_node(node) for node in graph.nodes),
        inputs=tuple(_port(port) for port in graph.inputs),
        outputs=tuple(_port(port) for port in graph.outputs),
    )


def _node(node: Node) -> Node:
    attrs = {name: _attribute(value) for name, value in node.attrs.items()}
    if node.op_type == "Cast" and attrs["to"] in _HALVES:
        attrs["to"] = int(TensorProto.FLOAT)
    return replace(node, attrs=attrs)


def _attribute(value: Any) -> Any:
    if isinstance(value, Subgraph):
        return replace(value, nodes=tuple(_node(node) for node in value.nodes))
    return value


def _port(port: Port) -> Port:
    return replace(port, elem_type=int(TensorProto.FLOAT)) if port.elem_type in _HALVES else port


def is_half(dtype: np.dtype[Any]) -> bool:
    return dtype in _HALVES.values()


def widened(values: Sequence[Array | None]) -> list[Array | None]:
    """``values`` to compute with: halves as float32."""
    return [v.astype(np.float32) if v is not None and is_half(v.dtype) else v for v in values]


def narrowed(result: Array, values: Sequence[Array | None]) -> Array:
    """A large result of halves alone is as large as they are, a weight computed from a weight."""
    halves = {v.dtype for v in values if v is not None and v.dtype.kind not in "iub"}
    if result.size <= EXPAND_LIMIT or result.dtype != np.float32 or len(halves) != 1:
        return result
    (dtype,) = halves
    return result.astype(dtype) if is_half(dtype) else result
