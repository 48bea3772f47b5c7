"""Inputs and outputs of a graph: their names, order and types, and which output is compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.verify import Reference
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build

TINY = Tiny(rope="rotate_half", layers=2)
TOKENS = np.random.default_rng(2).integers(0, TINY.vocab, 20)


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for port in (*model.graph.input, *model.graph.output):
        port.name = new if port.name == old else port.name


def hidden_states(model: onnx.ModelProto, width: int) -> list[onnx.ValueInfoProto]:
    """What each residual addition makes, as outputs."""
    adds = [n.output[0] for n in model.graph.node if n.op_type == "Add"]
    readers = {name: [n for n in model.graph.node if name in n.input] for name in adds}
    found = [name for name in adds if any(r.op_type == "Pow" for r in readers[name])]
    return [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "seq", width])
        for name in found
    ]


def agrees(path: Path, output: str) -> bool:
    model = import_onnx(path, context=32)
    assert model.outputs[0].name == output
    want = run_onnxruntime(path, TOKENS, output)
    return bool(np.abs(evaluate(model, TOKENS) - want).max() <= 2e-4 * np.ptp(want))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["logits", "output_7"])
def test_logits_are_compiled_whatever_other_outputs_there_are(name, first, tmp_path):
    model = build(TINY)
    states = hidden_states(model, TINY.hidden)
    assert len(states) == 4
    rename(model, "logits", name)
    outputs = [*states, *model.graph.output] if first else [*model.graph.output, *states]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    path = save(model, tmp_path)
    assert agrees(path, name)
    assert sum("is not emitted" in note for note in import_onnx(path, context=32).notes) == 4


def test_float16_logits_are_the_same_model(tmp_path):
    model = build(TINY)
    rename(model, "logits", "wide")
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.FLOAT16))
    model.graph.output[0].name = "logits"
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    path = save(model, tmp_path)
    want = run_onnxruntime(path, TOKENS).astype(np.float32)
    got = evaluate(import_onnx(path, context=32), TOKENS)
    assert np.abs(got - want).max() <= 2**-11 * np.abs(want).max() + 2e-4 * np.ptp(want)


@pytest.mark.parametrize("dims", [["B", "S"], [None, None], [1, "S"]])
def test_tokens_in_int32_and_any_name_of_the_batch_are_taken(dims, tmp_path):
    model = build(TINY)
    port = helper.make_tensor_value_info("input_ids", TensorProto.INT32, dims)
    model.graph.input[0].CopyFrom(port)
    assert agrees(save(model, tmp_path), "logits")


@pytest.mark.parametrize(
    ("name", "dims", "hint"),
    [
        ("attention_mask", ["b", 1, "q", "k"], "one of valid positions"),
        ("inputs_embeds", ["b", "s", 24], "export the model with input_ids"),
    ],
)
def test_an_input_that_cannot_be_compiled_is_refused_with_what_to_do(name, dims, hint, tmp_path):
    model = build(TINY)
    port = helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
    model.graph.input.append(port)
    with pytest.raises(UnsupportedOpError, match=hint):
        import_onnx(save(model, tmp_path))


def test_a_decoder_may_give_other_rows_than_logits(tmp_path):
    model = build(TINY)
    states = hidden_states(model, TINY.hidden)
    del model.graph.output[:]
    model.graph.output.append(states[-1])
    path = save(model, tmp_path)
    assert agrees(path, states[-1].name)
    assert import_onnx(path, context=32).outputs[0].features == TINY.hidden


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_scaled_and_capped_logits_follow_the_head(factor, tmp_path):
    model = build(TINY)
    rename(model, "logits", "raw")
    constant = onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor")
    model.graph.initializer.append(constant)
    model.graph.node.extend(
        [
            helper.make_node("Div", ["raw", "factor"], ["scaled"]),
            helper.make_node("Tanh", ["scaled"], ["bent"]),
            helper.make_node("Mul", ["bent", "factor"], ["logits"]),
        ]
    )
    model.graph.output[0].name = "logits"
    path = save(model, tmp_path)
    assert agrees(path, "logits")
    assert "elementwise ops" in "".join(import_onnx(path, context=32).notes)


@pytest.mark.parametrize("dims", [[], [1]])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("name", ["num_logits_to_keep", "logits_to_keep"])
def test_all_logits_are_compiled_where_an_input_says_how_many_are_kept(name, kind, dims, tmp_path):
    """As browsers' exports have it: 0 keeps all, ``hidden[:, -0:]``."""
    model = build(TINY)
    head = model.graph.node[-1]
    for node in (
        helper.make_node("Cast", [name], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "flat"], ["last"]),
        helper.make_node("Neg", ["last"], ["begin"]),
        helper.make_node("Slice", [head.input[0], "begin", "end", "axis"], ["kept"]),
    ):
        model.graph.node.append(node)
    head.input[0] = "kept"
    numbers = {"flat": [1], "end": [2**63 - 1], "axis": [1]}
    for label, values in numbers.items():
        constant = onnx.numpy_helper.from_array(np.array(values, np.int64), label)
        model.graph.initializer.append(constant)
    model.graph.input.append(helper.make_tensor_value_info(name, kind, dims))
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "kept", TINY.vocab])
    )
    path = save(model, tmp_path)
    want = Reference(path).rows(TOKENS)
    got = evaluate(import_onnx(path, context=32), TOKENS)
    assert want.shape == (len(TOKENS), TINY.vocab)
    assert np.abs(got - want).max() <= 2e-4 * np.ptp(want)
