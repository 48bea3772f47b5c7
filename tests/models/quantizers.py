"""onnxruntime's own quantizers, called as their documentation says."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

BLOCK_SIZE = 32
# MatMulNBits: compute on activations that are quantized to int8 in blocks.
INT8_ACTIVATIONS = 4


def fold_tied_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace ``MatMul(x, Transpose(table))`` by a matrix of its own, in place.

    A tied head leaves torch's exporter as the embedding table's transpose, and both quantizers pass
    over a MatMul whose right side is no initializer.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "Transpose"]:
        if node.input[0] in constants:
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            value = numpy_helper.to_array(constants[node.input[0]]).transpose(perm)
            folded = numpy_helper.from_array(np.ascontiguousarray(value), node.output[0])
            model.graph.initializer.append(folded)
            model.graph.node.remove(node)
    return model


def quantize_int4(
    model: onnx.ModelProto,
    *,
    symmetric: bool = True,
    accuracy_level: int | None = INT8_ACTIVATIONS,
    ops: tuple[str, ...] = ("MatMul",),
) -> onnx.ModelProto:
    """MatMul -> MatMulNBits, and with "Gather" in ``ops`` Gather -> GatherBlockQuantized."""
    from onnxruntime.quantization import matmul_nbits_quantizer

    # It logs a line for every node of the graph.
    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=BLOCK_SIZE,
        is_symmetric=symmetric,
        accuracy_level=accuracy_level,
        op_types_to_quantize=ops,
    )
    quantizer.process()
    return quantizer.model.model


def quantize_int8(source: Path, target: Path, *, per_channel: bool = False) -> None:
    """Dynamic quantization: DynamicQuantizeLinear and MatMulInteger, the embedding in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=per_channel)
