"""Quantizations of exported files by onnxruntime's quantizers, with every option that matters."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from corpus.families import final_token
from corpus.inputs import LEAST_VOCAB_SIZE, ended, source_of, token_sequences
from corpus.oracle import Calls
from corpus.pruned import PATTERNS
from corpus.transforms import EVERY_FAMILY, EVERY_HEAD, add

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.models.quantizers import fold_tied_head

_CALIBRATION_LENGTHS = (5, 9, 17)
_MASKED = 1e30  # what no score is, nor less its negative
_OF_A_SOURCE = {"encoder_hidden_states", "decoder_input_ids"}
MERGED = ("llama-optimum-merged", "gpt2-optimum-merged", "gemma3-optimum-merged",
          "t5-optimum-merged")  # fmt: skip
logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)


# ---- float16


def _float16(source: Path, target: Path, *, keep_io: bool) -> None:
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io), target)


add("fp16", partial(_float16, keep_io=False), "gpt2-script-masked", *EVERY_FAMILY, *EVERY_HEAD)
add("fp16-float32-io", partial(_float16, keep_io=True), "llama-optimum-past", "gpt2-script-masked",
    "bert-optimum")  # fmt: skip


# ---- int8, dynamic and static


def _dynamic(source: Path, target: Path, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "source.onnx"
        onnx.save(fold_tied_head(onnx.load(source)), folded)
        quantize_dynamic(folded, target, **options)


_DYNAMIC = {
    "dynamic-s8": {"weight_type": QuantType.QInt8},
    "dynamic-u8": {"weight_type": QuantType.QUInt8},
    "dynamic-s8-channel": {"weight_type": QuantType.QInt8, "per_channel": True},
    "dynamic-u8-channel": {"weight_type": QuantType.QUInt8, "per_channel": True},
    "dynamic-s8-reduced": {"weight_type": QuantType.QInt8, "reduce_range": True},
    "dynamic-s8-matmul": {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]},
}
for _name, _options in _DYNAMIC.items():
    add(_name, partial(_dynamic, **_options), "llama-optimum-past", "gpt2-script-masked",
        "bert-optimum", "minilm-dynamo-masked")  # fmt: skip
add("dynamic-s8", partial(_dynamic, **_DYNAMIC["dynamic-s8"]), "qwen3-moe-script-past",
    *EVERY_FAMILY, *EVERY_HEAD)  # fmt: skip
add("dynamic-s8", partial(_dynamic, weight_type=QuantType.QInt8,
    extra_options={"EnableSubgraph": True}), *MERGED)  # fmt: skip


# Both sides of attention's products too, as optimum's quantizers do.
add("dynamic-s8-attention", partial(_dynamic, weight_type=QuantType.QInt8,
    extra_options={"MatMulConstBOnly": False}), "llama-optimum-past", "gpt2-script-masked",
    "bert-optimum", "minilm-dynamo-masked")  # fmt: skip


class _Calibration(CalibrationDataReader):
    """Random tokens of a few lengths, the second half of them where the file takes a past."""

    def __init__(self, path: Path) -> None:
        self._feeds = self._all(path)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)

    def _all(self, path: Path) -> Iterator[dict[str, np.ndarray]]:
        calls = Calls(path)
        inputs = {port.name for port in onnx.load(path, load_external_data=False).graph.input}
        source = source_of("encoder-decoder" if inputs & _OF_A_SOURCE else "decoder")
        end = final_token(path.parent.name)
        for tokens in token_sequences(LEAST_VOCAB_SIZE, _CALIBRATION_LENGTHS):
            tokens = ended(tokens, end)
            calls.reset()
            if calls.has_cache:
                calls.rows(tokens[: len(tokens) // 2])
                tokens = tokens[len(tokens) // 2 :]
            yield calls.feeds(tokens, source)


def _static(source: Path, target: Path, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folded, prepared = Path(folder) / "source.onnx", Path(folder) / "prepared.onnx"
        onnx.save(fold_tied_head(onnx.load(source)), folded)
        quant_pre_process(folded, prepared, skip_symbolic_shape=True)
        feeds = _Calibration(source).get_next()
        options["nodes_to_exclude"] = _mask_nodes(prepared, feeds)
        quantize_static(prepared, target, _Calibration(source), **options)


def _mask_nodes(path: Path, feeds: dict[str, np.ndarray]) -> list[str]:
    """A decoder's nodes that a causal mask passes: rounded together with its infinities, all scores
    are one, which is why people leave them out."""
    model = onnx.load(path)
    if model.graph.output[0].name != "logits":
        return []
    names = [name for node in model.graph.node for name in node.output if name]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = dict(zip(names, session.run(None, feeds), strict=True))
    values |= {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    masks = {name for name, value in values.items() if _has_infinities(value)}
    return [n.name for n in model.graph.node if masks.intersection([*n.input, *n.output])]


def _has_infinities(value: np.ndarray) -> bool:
    """Whether it holds what a mask has in the place of infinity."""
    return value.dtype == np.float32 and bool((np.abs(value) > _MASKED).any())


_U8, _S8, _U16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16
_MATMULS = ["MatMul", "Gemm"]
_QDQ, _QOPERATOR = QuantFormat.QDQ, QuantFormat.QOperator
_STATIC: dict[str, dict[str, Any]] = {
    "qdq-u8s8": {"quant_format": _QDQ, "activation_type": _U8, "weight_type": _S8},
    "qdq-s8s8": {"quant_format": _QDQ, "activation_type": _S8, "weight_type": _S8},
    "qdq-s8s8-channel": {
        "quant_format": _QDQ, "activation_type": _S8, "weight_type": _S8, "per_channel": True,
    },
    "qdq-u16s8": {
        "quant_format": _QDQ, "activation_type": _U16, "weight_type": _S8,
        "extra_options": {"UseQDQContribOps": True},
    },
    "qdq-u8s8-matmul": {
        "quant_format": _QDQ, "activation_type": _U8, "weight_type": _S8,
        "op_types_to_quantize": _MATMULS,
    },
    "qdq-u8s8-channel-matmul": {
        "quant_format": _QDQ, "activation_type": _U8, "weight_type": _S8, "per_channel": True,
        "op_types_to_quantize": _MATMULS,
    },
    "qdq-u16s8-matmul": {
        "quant_format": _QDQ, "activation_type": _U16, "weight_type": _S8,
        "op_types_to_quantize": _MATMULS, "extra_options": {"UseQDQContribOps": True},
    },
    "qoperator-u8s8": {"quant_format": _QOPERATOR, "activation_type": _U8, "weight_type": _S8},
    "qoperator-u8u8": {"quant_format": _QOPERATOR, "activation_type": _U8, "weight_type": _U8},
    "qoperator-u8s8-channel": {
        "quant_format": _QOPERATOR, "activation_type": _U8, "weight_type": _S8,
        "per_channel": True,
    },
    "qoperator-u8s8-matmul": {
        "quant_format": _QOPERATOR, "activation_type": _U8, "weight_type": _S8,
        "op_types_to_quantize": _MATMULS,
    },
}  # fmt: skip
for _name, _options in _STATIC.items():
    add(_name, partial(_static, **_options), "llama-optimum", "gpt2-script-masked", "bert-optimum")
for _name in ("qdq-u8s8", "qdq-u8s8-matmul", "qoperator-u8s8"):
    add(_name, partial(_static, **_STATIC[_name]), *EVERY_FAMILY, *EVERY_HEAD)

# Of what is pruned in one pattern, too.
_PRUNED = [f"{source}-pruned-{name}" for source in ("llama-optimum-past", "bert-dynamo")
           for name in PATTERNS]  # fmt: skip
add("dynamic-s8", partial(_dynamic, **_DYNAMIC["dynamic-s8"]), *_PRUNED)
add("qdq-u8s8-matmul", partial(_static, **_STATIC["qdq-u8s8-matmul"]),
    *(cell for cell in _PRUNED if cell.startswith("bert")))  # fmt: skip


# ---- MatMulNBits and its kin


def quantize_nbits(source: Path, target: Path, **options: Any) -> None:
    """MatMul -> MatMulNBits, with int8 activations unless ``accuracy_level`` says otherwise."""
    model = fold_tied_head(onnx.load(source))
    options.setdefault("accuracy_level", 4)
    quantizer = nbits.MatMulNBitsQuantizer(model, **options)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


_NBITS: dict[str, dict[str, Any]] = {
    f"int{bits}-block{block}": {"bits": bits, "block_size": block, "is_symmetric": True}
    for bits in (4, 8)
    for block in (16, 32, 64, 128, 256)
}
_NBITS |= {
    "int4-block32-zp": {"block_size": 32, "is_symmetric": False},
    "int4-block16-zp": {"block_size": 16, "is_symmetric": False},
    "int4-block128-zp": {"block_size": 128, "is_symmetric": False},
    "int8-block32-zp": {"bits": 8, "block_size": 32, "is_symmetric": False},
    "int4-level0": {"block_size": 32, "is_symmetric": True, "accuracy_level": 0},
    "int4-zp-level0": {"block_size": 32, "is_symmetric": False, "accuracy_level": 0},
    "int8-level0": {"bits": 8, "block_size": 32, "is_symmetric": True, "accuracy_level": 0},
    "int2-block32": {"bits": 2, "block_size": 32, "is_symmetric": True, "accuracy_level": 0},
    "int2-block32-zp": {"bits": 2, "block_size": 32, "is_symmetric": False, "accuracy_level": 0},
    "int4-gather": {
        "block_size": 32, "is_symmetric": True, "op_types_to_quantize": ("MatMul", "Gather"),
    },
    "int4-gather-zp": {
        "block_size": 32, "is_symmetric": False, "op_types_to_quantize": ("MatMul", "Gather"),
    },
    "int4-qdq": {"block_size": 32, "is_symmetric": True, "quant_format": _QDQ},
    "int4-qdq-zp": {"block_size": 32, "is_symmetric": False, "quant_format": _QDQ},
    "int4-qdq-channel": {
        "block_size": 32, "is_symmetric": True, "quant_format": _QDQ,
        "channel_wised_quantize": True,
    },
}  # fmt: skip
NBITS_SOURCES = ("llama-optimum-past", "qwen2-dynamo")
for _name, _options in _NBITS.items():
    add(_name, partial(quantize_nbits, **_options), *NBITS_SOURCES)
_NBITS_OF_ALL = (*EVERY_FAMILY, *MERGED)
add("int4-block32", partial(quantize_nbits, **_NBITS["int4-block32"]), "gpt2-dynamo-masked",
    "qwen3-moe-script-past", *_NBITS_OF_ALL, *EVERY_HEAD)  # fmt: skip
add("int4-zp-level0", partial(quantize_nbits, **_NBITS["int4-zp-level0"]), *_NBITS_OF_ALL)
add("int4-block32", partial(quantize_nbits, **_NBITS["int4-block32"]), *_PRUNED)
# float16 with the activations of the products in float16 too, as models for GPUs are kept.
add("int4-level0", partial(quantize_nbits, **_NBITS["int4-level0"]), "llama-optimum-past-fp16",
    "qwen3-optimum-past-fp16", "gemma3-optimum-past-fp16", "bert-optimum-fp16")  # fmt: skip


def _nbits_algorithm(config: Callable[[], Any], source: Path, target: Path) -> None:
    quantize_nbits(source, target, algo_config=config(), block_size=16)


_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "int4-hqq": partial(nbits.HQQWeightOnlyQuantConfig, block_size=16),
    "int4-rtn": nbits.RTNWeightOnlyQuantConfig,
    "int4-k-quant": nbits.KQuantWeightOnlyQuantConfig,
}
for _name, _config in _ALGORITHMS.items():
    # Two of them take an even number of blocks only.
    add(_name, partial(_nbits_algorithm, _config), "qwen2-optimum-past")
