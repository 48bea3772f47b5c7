"""What a file makes of hidden tokens is found, and is what onnxruntime makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx, import_with_mask
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import encode_source, evaluate
from slmtvm.verify import Reference
from tests.models.corpus import corpus_path

CONTEXT = 61
TOKENS = 23  # longer than every window of the corpus
KINDS = {
    "bert-dynamo-masked-int32": "keys",
    "bert-optimum": "keys",
    "bert-optimum-qdq-u8s8-matmul": "keys",
    "bloom-dynamo-past": "skip",  # ALiBi of the visible tokens before
    "bloom-optimum": "skip",
    "bloom-script-masked": "skip",
    "gemma2-optimum": "keys",
    "gemma2-script-masked": "keys",  # windows that count hidden tokens
    "gpt-neox-optimum": "skip",
    "gpt-neox-script-masked": "keys",
    "gpt2-dynamo-masked": "keys",
    "gpt2-optimum-past": "skip",
    "gpt2-script-masked": "keys",
    "llama-dynamo-opset22": "keys",
    "llama-optimum-merged": "skip",
    "llama-optimum-past": "skip",  # position_ids
    "llama-script-masked": "keys",
    "minilm-script-masked": "keys",
    "mistral-dynamo-masked": "keys",
    "mistral-script-masked": "keys",
    "mixtral-script-masked": "keys",
    "mpnet-optimum": "keys",  # positions count tokens that are not padding, biases count all
    "opt-optimum": "skip",
    "opt-script-masked": "skip",  # positions count what the mask shows
    "qwen3-moe-optimum-past": "skip",  # experts' results are scattered into zeros
    "qwen3-optimum-past": "skip",
    "roberta-optimum": "skip",  # hidden tokens are padding, which positions do not count
    "roberta-script-masked": "skip",
}
SOURCES = {
    "bart-optimum-merged": "decoder_model_merged.onnx",
    "bart-script-masked": "model.onnx",
    "t5-optimum": "decoder_model.onnx",
    "t5-script-masked": "model.onnx",
}
REFUSED = {
    "llama-dynamo": "no input is a mask",
    "llama-builder-int4": "GroupQueryAttention.*how many tokens are visible",
    "lfm2-moe-builder-fp32": "CausalConvWithState.*convolution over neighbouring tokens",
    "mistral-optimum-past": "other keys are visible.*by position, differ",
    "bert-script-masked-fused": "does not take all weight from hidden keys",  # takes a length
    "bert-optimum-dynamic-u8": "dynamic quantization takes its range over all tokens",
}


def _masks() -> dict[str, np.ndarray]:
    holes = np.random.default_rng(1).random(TOKENS) < 0.6
    holes[[0, TOKENS - 1]] = False, True
    left, right = np.ones((2, TOKENS), bool)
    left[:5] = right[-8:] = False
    return {"left": left, "right": right, "holes": holes}


def _tokens(model: CanonicalModel, mask: np.ndarray) -> np.ndarray:
    """Random ones; where positions do not count padding, hidden tokens are that."""
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, len(mask))
    pads = model.mask == "skip" and model.padding
    return np.where(mask, tokens, model.padding[0]) if pads else tokens


@pytest.mark.slow
@pytest.mark.parametrize("cell", KINDS)
def test_a_masked_sequence_computes_what_onnxruntime_computes(cell: str) -> None:
    path = corpus_path(cell)
    model = import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert model.mask == KINDS[cell]
    reference = Reference(path)
    for mask in _masks().values():
        tokens = _tokens(model, mask)
        ours, theirs = evaluate(model, tokens, mask=mask), reference.rows(tokens, mask=mask)
        assert np.abs(ours - theirs)[mask].max() < 2e-4 * np.ptp(theirs[mask])
        assert not ours[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("cell", SOURCES)
def test_a_masked_source_computes_what_onnxruntime_computes(cell: str) -> None:
    path = corpus_path(cell, SOURCES[cell])
    model = import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert model.mask == "keys"
    reference = Reference(path)
    text = np.random.default_rng(2).integers(3, model.vocab_size, 9)
    for mask in _masks().values():
        source = _tokens(model, mask)
        ours = evaluate(model, text, source, mask=mask)
        theirs = reference.rows(text, source, mask)
        assert np.abs(ours - theirs).max() < 2e-4 * np.ptp(theirs)
        assert not encode_source(model, source, mask=mask)[~mask].any()


@pytest.mark.parametrize("cell", REFUSED)
def test_a_file_whose_masks_cannot_be_compiled_is_refused_with_the_reason(cell: str) -> None:
    path = corpus_path(cell)
    with pytest.raises(UnsupportedOpError, match=REFUSED[cell]) as caught:
        import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert str(path) in str(caught.value)
    model, reason = import_with_mask(path, context=CONTEXT)
    assert model.mask == "none"
    assert reason == str(caught.value)


def test_a_window_that_no_sequence_reaches_does_not_matter() -> None:
    # Its window counts hidden tokens and its positions do not: only without a window it is one.
    path = corpus_path("mistral-optimum-past")
    assert import_onnx(path, context=8, mask="arbitrary").mask == "skip"


def test_without_the_option_nothing_is_asked_of_the_mask() -> None:
    model = import_onnx(corpus_path("lfm2-moe-builder-fp32"), context=CONTEXT)
    assert model.mask == "none"
    with pytest.raises(SlmError, match="must be one of none, arbitrary, not 'any'"):
        import_onnx(corpus_path("llama-script-masked"), mask="any")


def _node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def _scaled_by_hidden(model: onnx.ModelProto, target: onnx.NodeProto) -> None:
    """Multiply what ``target`` makes by the length over the number of visible tokens."""
    nodes = model.graph.node
    made = target.output[0]
    for node in nodes:
        node.input[:] = ["scaled" if name == made else name for name in node.input]
    of_mask = [
        helper.make_node("Cast", ["attention_mask"], ["mask_f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["mask_f"], ["shown"], keepdims=0),
        helper.make_node("Shape", ["attention_mask"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["sizes_f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceProd", ["sizes_f"], ["total"], keepdims=0),
        helper.make_node("Div", ["total", "shown"], ["factor"]),
    ]
    place = list(nodes).index(target) + 1
    nodes.insert(place, helper.make_node("Mul", [made, "factor"], ["scaled"]))
    for node in reversed(of_mask):
        nodes.insert(0, node)


def _scaled_weights(model: onnx.ModelProto) -> None:
    _scaled_by_hidden(model, _node(model, "Softmax"))


def _scaled_rows(model: onnx.ModelProto) -> None:
    _scaled_by_hidden(model, _node(model, "Sigmoid"))


def _unused(model: onnx.ModelProto) -> None:
    """Take the mask from the softmax's scores: an input that nothing reads."""
    kept = "tokens_instead"
    model.graph.node.insert(0, helper.make_node("Shape", ["input_ids"], ["size_of_ids"]))
    model.graph.node.insert(
        1,
        helper.make_node(
            "ConstantOfShape", ["size_of_ids"], [kept],
            value=numpy_helper.from_array(np.ones(1, np.int64)),
        ),
    )  # fmt: skip
    for node in list(model.graph.node)[2:]:
        node.input[:] = [kept if name == "attention_mask" else name for name in node.input]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_scaled_weights, "Softmax.*mask changes weights after the softmax"),
        (_scaled_rows, "neither left out.*Mul.*'factor', by position, differ"),
        (_unused, "Softmax.*does not take all weight from hidden keys"),
    ],
)
def test_what_else_a_mask_changes_is_found(
    edit: Callable[[onnx.ModelProto], None], reason: str, tmp_path: Path
) -> None:
    model = onnx.load(corpus_path("llama-script-masked"))
    edit(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    import_onnx(path, context=CONTEXT)
    with pytest.raises(UnsupportedOpError, match=reason):
        import_onnx(path, context=CONTEXT, mask="arbitrary")


def test_a_mask_that_is_rounded_away_is_refused(tmp_path: Path) -> None:
    model = onnx.load(corpus_path("bert-script-masked"))
    softmax = _node(model, "Softmax")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "middle"))
    rounding = [
        helper.make_node("QuantizeLinear", [softmax.input[0], "step", "middle"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "step", "middle"], ["rounded"]),
    ]
    place = list(model.graph.node).index(softmax)
    for node in reversed(rounding):
        model.graph.node.insert(place, node)
    softmax.input[0] = "rounded"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    import_onnx(path, context=CONTEXT)
    with pytest.raises(UnsupportedOpError, match=r"QuantizeLinear.*rounded after the mask was"):
        import_onnx(path, context=CONTEXT, mask="arbitrary")


def _with_rounded_sums(model: onnx.ModelProto, counted: float) -> None:
    """Round each attention's scores with their bias, plus ``counted`` for each hidden token."""
    nodes, numbers = model.graph.node, {
        "step": np.float32(0.05), "middle": np.uint8(90), "counted": np.float32(counted),
        "one": np.int64(1),
    }  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(n, k) for k, n in numbers.items())
    for softmax in [n for n in nodes if n.op_type == "Softmax"]:
        masked = next(n for n in nodes if softmax.input[0] in n.output)
        scores = masked.input[0]
        rounding = [
            helper.make_node("Add", [scores, "shift"], [f"{scores}.sum"]),
            helper.make_node(
                "QuantizeLinear", [f"{scores}.sum", "step", "middle"], [f"{scores}.q"]
            ),
            helper.make_node(
                "DequantizeLinear", [f"{scores}.q", "step", "middle"], [f"{scores}.r"]
            ),
        ]
        for node in reversed(rounding):
            nodes.insert(list(nodes).index(masked), node)
        masked.input[0] = f"{scores}.r"
    count = [
        helper.make_node("Sub", ["one", "attention_mask"], ["hidden"]),
        helper.make_node("ReduceSum", ["hidden"], ["count"], keepdims=0),
        helper.make_node("Cast", ["count"], ["count_f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["count_f", "counted"], ["shift"]),
    ]
    for node in reversed(count):
        nodes.insert(0, node)


def test_scores_that_are_rounded_with_a_bias_are_those_of_onnxruntime(tmp_path: Path) -> None:
    model = onnx.load(corpus_path("bloom-script-masked"))
    _with_rounded_sums(model, counted=0.0)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    model = import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert model.mask == "skip"
    reference = Reference(path)
    for mask in _masks().values():
        tokens = _tokens(model, mask)
        ours, theirs = evaluate(model, tokens, mask=mask), reference.rows(tokens, mask=mask)
        errors = np.abs(ours - theirs)[mask].max(axis=1) / np.ptp(theirs[mask])
        assert np.median(errors) < 2e-4
        assert errors.max() < 2e-2  # a last bit can turn a rounding


def test_what_all_scores_of_a_row_gain_under_a_mask_matters_where_they_are_rounded(
    tmp_path: Path,
) -> None:
    model = onnx.load(corpus_path("bloom-script-masked"))
    _with_rounded_sums(model, counted=0.3)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(UnsupportedOpError, match=r"Softmax.*what is added to scores differs"):
        import_onnx(path, context=CONTEXT, mask="arbitrary")
    for node in model.graph.node:  # without the roundings
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.input[1:]
            node.op_type = "Identity"
    onnx.save(model, path)
    assert import_onnx(path, context=CONTEXT, mask="arbitrary").mask == "skip"


def test_positions_that_a_fused_norm_adds_are_looked_at(tmp_path: Path) -> None:
    model = onnx.load(corpus_path("bert-script-masked"))
    norm = _node(model, "LayerNormalization")
    total = next(n for n in model.graph.node if n.output[0] == norm.input[0])
    fused = helper.make_node(
        "SkipLayerNormalization", [*total.input, *norm.input[1:]], norm.output,
        domain="com.microsoft", epsilon=1e-12,
    )  # fmt: skip
    place = list(model.graph.node).index(norm)
    model.graph.node.insert(place, fused)
    model.graph.node.remove(norm)
    model.graph.node.remove(total)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert import_onnx(path, context=CONTEXT, mask="arbitrary").mask == "keys"
