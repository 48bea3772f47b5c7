"""What optimizers make of exported files: onnxruntime.transformers, and onnxruntime itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from corpus.transforms import add, transform

_HEADS = {
    "bert": (1, 80), "tinybert": (3, 78), "minilm": (3, 96), "roberta": (1, 88),
    "distilbert": (3, 72), "gpt2": (2, 80), "gpt2-quickgelu": (2, 80), "llama": (3, 72),
    "smollm": (6, 96), "phi3": (1, 96), "t5": (2, 80), "mpnet": (3, 72), "qwen2": (2, 96),
}  # fmt: skip


def _optimized(
    source: Path, target: Path, *, model_type: str, options: dict[str, bool], level: int = 0
) -> None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    family = max((f for f in _HEADS if source.parent.name.startswith(f"{f}-")), key=len)
    heads, hidden = _HEADS[family]
    fusion = FusionOptions(model_type)
    for name, value in options.items():
        setattr(fusion, name, value)
    model = optimize_model(
        str(source), model_type=model_type, num_heads=heads, hidden_size=hidden,
        optimization_options=fusion, opt_level=level,
    )  # fmt: skip
    model.save_model_to_file(str(target))


_ENCODERS = (
    "bert-script-masked", "bert-dynamo-masked", "bert-optimum", "tinybert-script-masked",
    "minilm-script-masked", "distilbert-script-masked", "roberta-script-masked",
)  # fmt: skip
_GPT2 = ("gpt2-script-masked", "gpt2-script-past", "gpt2-optimum-past", "gpt2-dynamo-masked")
_LLAMAS = ("llama-optimum-past", "llama-script-masked", "qwen2-optimum-past", "phi3-optimum-past")
_VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {"options": {}},
    "fused-mha": {"options": {"use_multi_head_attention": True}},
    "fused-mask": {"options": {"use_raw_attention_mask": True}},
    "fused-fastgelu": {"options": {"enable_gelu_approximation": True}},
    "fused-level1": {"options": {}, "level": 1},
    "fused-level2": {"options": {}, "level": 2},
}
for _name, _arguments in _VARIANTS.items():
    add(_name, partial(_optimized, model_type="bert", **_arguments), *_ENCODERS)
for _name in ("fused", "fused-level2"):
    add(_name, partial(_optimized, model_type="gpt2", **_VARIANTS[_name]), *_GPT2)
    add(_name, partial(_optimized, model_type="gpt2", **_VARIANTS[_name]), *_LLAMAS)


def _saved(level: str, source: Path, target: Path) -> None:
    """The graph that onnxruntime itself would run, saved before it runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


_SAVED_SOURCES = (
    "llama-optimum-past", "llama-optimum-past-dynamic-s8", "gpt2-script-masked",
    "gpt2-quickgelu-script-masked", "bert-optimum", "bert-optimum-dynamic-s8",
    "bert-optimum-qdq-u8s8", "llama-optimum-qdq-u8s8", "gpt2-script-masked-qdq-u8s8-matmul",
    "gpt2-script-masked-dynamic-s8",
)  # fmt: skip
# Saved, float16 has its softmax written out, and MatMulNBits an attribute of the newest release.
_SAVED_HALVES = ("gpt2-optimum-past-fp16", "llama-optimum-past-int4-block32")
add("ort-basic", partial(_saved, "ORT_ENABLE_BASIC"), *_SAVED_SOURCES, *_SAVED_HALVES)
add("ort-extended", partial(_saved, "ORT_ENABLE_EXTENDED"), *_SAVED_SOURCES)


@transform("dynamic-s8", "bert-script-masked-fused", "gpt2-script-masked-fused")
def _fused_dynamic(source: Path, target: Path) -> None:
    """Dynamic int8 of a fused graph: QAttention, QEmbedLayerNormalization."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, target, weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip


# ---- the same model, kept otherwise


@transform("external", "llama-optimum-past", "bert-optimum", "llama-optimum-past-int4-block32")
def _external(source: Path, target: Path) -> None:
    """Weights in a file beside the model's."""
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, location=f"{target.name}_data",
        size_threshold=0,
    )  # fmt: skip


@transform("functions", "llama-optimum-past", "bert-dynamo")
def _functions(source: Path, target: Path) -> None:
    """Some nodes as calls of local functions, one of them calling another."""
    model = onnx.load(source)
    version = model.opset_import[0].version
    imports = [onnx.helper.make_opsetid("", version), onnx.helper.make_opsetid("corpus", 1)]
    add_ = onnx.helper.make_function(
        "corpus", "Sum2", ["a", "b"], ["c"], [onnx.helper.make_node("Add", ["a", "b"], ["c"])],
        imports,
    )  # fmt: skip
    outer = onnx.helper.make_function(
        "corpus", "Residual", ["a", "b"], ["c"],
        [onnx.helper.make_node("Sum2", ["a", "b"], ["c"], domain="corpus")], imports,
    )  # fmt: skip
    softmax = onnx.helper.make_node("Softmax", ["x"], ["y"])
    reference = softmax.attribute.add(name="axis", type=onnx.AttributeProto.INT)
    reference.ref_attr_name = "along"
    soft = onnx.helper.make_function(
        "corpus", "Soft", ["x"], ["y"], [softmax], imports, attributes=["along"]
    )
    for node in model.graph.node:
        if node.op_type == "Add" and not node.domain:
            node.op_type, node.domain = "Residual", "corpus"
        elif node.op_type == "Softmax":
            node.op_type, node.domain = "Soft", "corpus"
            for attribute in node.attribute:
                attribute.name = "along"
    model.functions.extend([add_, outer, soft])
    model.opset_import.append(onnx.helper.make_opsetid("corpus", 1))
    onnx.save(model, target)
