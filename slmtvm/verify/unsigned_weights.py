"""Products of signed weights as products of unsigned ones, whose sums are exact on every CPU.

On x86 without VNNI onnxruntime's kernels add up products of unsigned and signed bytes in pairs of
16 bits, which saturate: most sums of a layer with weights up to +-127 come out wrong, and a file
has other results than on every newer machine. Products of unsigned bytes are exact on all of them,
so there signed weights are shifted by 128, and so are their zero points: the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

_MICROSOFT = "com.microsoft"
# Operator -> its inputs that are the zero point of the first operand, the second operand, and the
# zero point of that; where the first operand has none as an input, it is unsigned.
OPERANDS = {
    ("", "MatMulInteger"): (2, 1, 3),
    ("", "QLinearMatMul"): (2, 3, 5),
    ("", "ConvInteger"): (2, 1, 3),
    ("", "QLinearConv"): (2, 3, 5),
    (_MICROSOFT, "MatMulIntegerToFloat"): (4, 1, 5),
    (_MICROSOFT, "DynamicQuantizeMatMul"): (None, 1, 3),
    (_MICROSOFT, "QGemm"): (2, 3, 5),
    (_MICROSOFT, "QAttention"): (6, 1, 7),
}
_SHIFT = "slmtvm.shift"  # int32 128
_ZERO = "slmtvm.zero"  # uint8 128: the zero point where there was none


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """``model``, changed in place, with products of unsigned bytes for those of signed weights.

    None where it has none. What computes the weights stays; nodes behind it shift them.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    found = False
    for graph, signed in _graphs(model.graph, set()):
        found |= _shift_weights(graph, signed)
    if not found:
        return None
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(128, np.int32), _SHIFT),
            numpy_helper.from_array(np.array(128, np.uint8), _ZERO),
        ]
    )
    return model


def _graphs(graph: onnx.GraphProto, outer: set[str]) -> Iterator[tuple[onnx.GraphProto, set[str]]]:
    """The graph and those in its nodes, each with what int8 inputs and constants it sees."""
    int8 = onnx.TensorProto.INT8
    signed = outer | {t.name for t in graph.initializer if t.data_type == int8}
    signed |= {given.name for given in graph.input if given.type.tensor_type.elem_type == int8}
    for node in graph.node:
        for attribute in node.attribute:
            if (
                node.op_type == "Constant"
                and attribute.name == "value"
                and attribute.t.data_type == int8
            ):
                signed.add(node.output[0])
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g, signed)
    yield graph, signed


def _shift_weights(graph: onnx.GraphProto, signed: set[str]) -> bool:
    """Give products of unsigned rows unsigned weights; whether there were any.

    Sums of products of signed bytes are exact, and few operators take signed by unsigned ones.
    """
    nodes: list[onnx.NodeProto] = []
    shifted: dict[str, str] = {}

    def unsigned(name: str) -> str:
        if name not in shifted:
            wide, sum_, shifted[name] = (f"slmtvm.{part}.{name}" for part in ("wide", "sum", "u8"))
            nodes.extend(
                [
                    helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.INT32),
                    helper.make_node("Add", [wide, _SHIFT], [sum_]),
                    helper.make_node("Cast", [sum_], [shifted[name]], to=onnx.TensorProto.UINT8),
                ]
            )
        return shifted[name]

    for node in graph.node:
        if operands := OPERANDS.get((_domain(node), node.op_type)):
            rows_zero, at, zero = operands
            inputs = [*node.input, *[""] * (zero + 1 - len(node.input))]
            rows_are_signed = inputs[0] in signed or (
                rows_zero is not None and inputs[rows_zero] in signed
            )
            if not rows_are_signed and (inputs[at] in signed or inputs[zero] in signed):
                inputs[at] = unsigned(inputs[at])
                inputs[zero] = unsigned(inputs[zero]) if inputs[zero] else _ZERO
                del node.input[:]
                node.input.extend(inputs)
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return bool(shifted)


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain
