"""onnxruntime's quantizers, each called as its documentation says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from slmtvm.errors import SlmError
from slmtvm.quantize.calibration import Feeds, save
from slmtvm.quantize.layers import Layer

# MatMulNBits: compute on activations that are quantized to int8 in blocks.
INT8_ACTIVATIONS = 4
_GPTQ_BLOCK = 128  # columns that GPTQ corrects together; has nothing to do with the groups


def quantize_blocks(
    model: ModelProto,
    layers: Sequence[Layer],
    *,
    method: str,
    bits: int,
    group: int,
    symmetric: bool,
    calibration: Feeds | None,
) -> ModelProto:
    """``layers`` of ``model`` as MatMulNBits; the others stay as they are.

    ``method``: "rtn", "k-quant", "gptq" or "hqq". GPTQ has no 8-bit form in onnxruntime; at 8 bits
    rounding to nearest leaves nothing to correct, and is what is done.
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if not layers:
        return model
    wanted = {layer.name for layer in layers}
    others = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in wanted]
    config: Any = None
    if method == "k-quant":
        config = nbits.KQuantWeightOnlyQuantConfig(
            customized_weight_config={name: {"bits": bits} for name in wanted}
        )
    elif method == "gptq" and bits == 4:
        config = nbits.GPTQWeightOnlyQuantConfig(calibration, block_size=_GPTQ_BLOCK)
        config.customized_weight_config = None
    elif method == "hqq":
        _need_torch()
        config = nbits.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
    with _quietly(), _without_torch():
        quantizer = nbits.MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=group,
            is_symmetric=symmetric,
            accuracy_level=INT8_ACTIVATIONS,
            nodes_to_exclude=others,
            algo_config=config,
        )
        quantizer.process()
    result: ModelProto = quantizer.model.model
    if all(entry.domain != "com.microsoft" for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return result


@contextmanager
def _without_torch() -> Iterator[None]:
    """onnxruntime's GPTQ imports torch, only to find that calibration data is none of torch's."""
    from onnxruntime.quantization.neural_compressor import util

    original = util.to_numpy
    util.to_numpy = np.asarray
    try:
        yield
    finally:
        util.to_numpy = original


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SlmError(
            "onnxruntime's HQQ quantizer needs torch: pip install torch, or choose another method"
        ) from error


def quantize_embeddings(model: ModelProto, *, group: int, symmetric: bool) -> ModelProto:
    """Tables that are only looked up, as 4-bit GatherBlockQuantized."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    tables = {t.name for t in model.graph.initializer if _is_table(t)}
    gathers = [n for n in model.graph.node if n.op_type == "Gather"]
    others = [n.name for n in gathers if n.input[0] not in tables]
    with _quietly():
        quantizer = nbits.MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=group,
            is_symmetric=symmetric,
            nodes_to_exclude=others,
            op_types_to_quantize=("Gather",),
        )
        quantizer.process()
    result: ModelProto = quantizer.model.model
    return result


def _is_table(tensor: TensorProto) -> bool:
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return len(tensor.dims) == 2 and tensor.data_type in floats


def set_accuracy_level(model: ModelProto, level: int) -> None:
    """How MatMulNBits treats activations, in every layer: some quantizers leave it out."""
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        others = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*others, helper.make_attribute("accuracy_level", level)])


def quantize_int8(
    model: ModelProto, layers: Sequence[Layer], *, static: bool, calibration: Feeds | None
) -> ModelProto:
    """``layers`` in int8 with a scale for each output feature, activations in 8 bits as well.

    ``static``: with ranges of activations from ``calibration``, else with those of each input.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    names = [layer.name for layer in layers]
    with tempfile.TemporaryDirectory() as scratch, _quietly():
        source, target = Path(scratch) / "float.onnx", Path(scratch) / "int8.onnx"
        save(model, source)
        run: Callable[..., None] = quantize_dynamic
        options: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True}
        if static:
            run = quantize_static
            options |= {"calibration_data_reader": calibration, "activation_type": QuantType.QUInt8}
        run(source, target, nodes_to_quantize=names, **options)
        return onnx.load(str(target))


@contextmanager
def _quietly() -> Iterator[None]:
    """The quantizers log a line for every node and draw bars on standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)
