"""Softmax that a graph writes out, against onnxruntime on the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.load import load
from slmtvm.importer.rewrite.softmax import join_softmax
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.recognise.experts.test_experts import gathered_matrices
from tests.importer.test_import_spellings import op_names

TINY = Tiny(rope="rotate_half", layers=2)
TOKENS = np.random.default_rng(2).integers(0, TINY.vocab, 20)
LAST = "last"  # the name of the axes


def node(kind: str, *inputs: str, output: str = "", **attrs: object) -> onnx.NodeProto:
    output = output or f"{kind}:{'|'.join(inputs)}"
    return helper.make_node(kind, inputs, [output], name=output, **attrs)


def plain(x: str, y: str) -> list[onnx.NodeProto]:
    largest = node("ReduceMax", x, LAST, keepdims=1)
    shifted = node("Sub", x, largest.output[0])
    powers = node("Exp", shifted.output[0])
    total = node("ReduceSum", powers.output[0], LAST)
    return [largest, shifted, powers, total,
            node("Div", powers.output[0], total.output[0], output=y)]  # fmt: skip


def squeezed(x: str, y: str) -> list[onnx.NodeProto]:
    """Reductions that drop their axis, which comes back."""
    nodes = plain(x, y)
    for place, index in ((3, 4), (0, 1)):
        reduction, reader = nodes[place], nodes[index]
        del reduction.attribute[:]
        reduction.attribute.append(helper.make_attribute("keepdims", 0))
        wide = node("Unsqueeze", reduction.output[0], LAST)
        reader.input[1] = wide.output[0]
        nodes.insert(index, wide)
    return nodes


def with_reciprocal(x: str, y: str) -> list[onnx.NodeProto]:
    *nodes, quotient = plain(x, y)
    inverse = node("Reciprocal", quotient.input[1])
    return [*nodes, inverse, node("Mul", inverse.output[0], quotient.input[0], output=y)]


def with_casts(x: str, y: str) -> list[onnx.NodeProto]:
    """As onnxruntime saves float16: every value is cast."""
    found: list[onnx.NodeProto] = []
    for step in plain(x, y):
        for place, name in enumerate(step.input):
            if name != LAST:
                cast = node("Cast", name, output=f"{step.name}.{place}", to=TensorProto.FLOAT)
                step.input[place] = cast.output[0]
                found.append(cast)
        found.append(step)
    return found


def with_a_constant_node(x: str, y: str) -> list[onnx.NodeProto]:
    axes = node("Constant", output=f"{y}.axes", value_ints=[-1])
    nodes = plain(x, y)
    for step in nodes:
        step.input[:] = [axes.output[0] if i == LAST else i for i in step.input]
    return [axes, *nodes]


def written_out(model: onnx.ModelProto, write) -> onnx.ModelProto:
    nodes = []
    for old in model.graph.node:
        nodes += write(old.input[0], old.output[0]) if old.op_type == "Softmax" else [old]
    assert len(nodes) > len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), LAST))
    return model


def agrees(path: Path) -> bool:
    want = run_onnxruntime(path, TOKENS)
    got = evaluate(import_onnx(path, context=32), TOKENS)
    return bool(np.abs(got - want).max() <= 2e-4 * np.ptp(want))


WAYS = [plain, squeezed, with_reciprocal, with_casts, with_a_constant_node]


@pytest.mark.parametrize("write", WAYS, ids=lambda f: f.__name__)
def test_an_attention_whose_softmax_is_written_out_is_one(write, tmp_path):
    path = save(written_out(build(TINY), write), tmp_path)
    usual = import_onnx(save(build(TINY), tmp_path, "usual.onnx"), context=32)
    assert op_names(import_onnx(path, context=32)) == op_names(usual)
    assert agrees(path)


@pytest.mark.parametrize("write", WAYS, ids=lambda f: f.__name__)
def test_nothing_is_left_of_what_was_joined(write, tmp_path):
    path = save(written_out(build(Tiny()), write), tmp_path)
    kinds = [n.op_type for n in join_softmax(load(path)).nodes]
    assert kinds.count("Softmax") == 1
    assert not {"ReduceMax", "Exp", "ReduceSum"} & set(kinds)


def test_a_router_whose_softmax_is_written_out_chooses_the_same_experts(tmp_path):
    path = save(written_out(build(Tiny(block=gathered_matrices)), plain), tmp_path)
    assert "slm.moe" in op_names(import_onnx(path, context=32))
    assert agrees(path)


def changed(kind: str, place: int, name: str):
    """``plain`` with another input at one node: of Softmax the operand, or a new value."""

    def write(x: str, y: str) -> list[onnx.NodeProto]:
        nodes = plain(x, y)
        (step,) = [n for n in nodes if n.op_type == kind]
        halved = node("Mul", x, "half")
        values = {"halved": halved.output[0], "powers": nodes[2].output[0], "x": x}
        step.input[place] = values[name]
        return [halved, *nodes] if name == "halved" else nodes

    return write


def on_another_axis(kind: str):
    def write(x: str, y: str) -> list[onnx.NodeProto]:
        nodes = plain(x, y)
        (step,) = [n for n in nodes if n.op_type == kind]
        step.input[1] = "other"
        return nodes

    return write


NOT_ONE = {
    "the largest of another value": changed("ReduceMax", 0, "halved"),
    "another value less the largest": changed("Sub", 0, "halved"),
    "divided by the sum of something else": changed("ReduceSum", 0, "x"),
    "something else divided": changed("Div", 0, "x"),
    "the largest of heads": on_another_axis("ReduceMax"),
    "the sum of heads": on_another_axis("ReduceSum"),
}


@pytest.mark.parametrize("what", NOT_ONE)
def test_what_only_looks_like_a_softmax_is_refused(what, tmp_path):
    model = written_out(build(TINY), NOT_ONE[what])
    for name, value in (("half", np.float32(0.5)), ("other", np.array([1]))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    with pytest.raises(UnsupportedOpError, match=r"not an attention|different positions"):
        import_onnx(save(model, tmp_path), context=32)


def test_parts_that_others_read_stay(tmp_path):
    model = written_out(build(Tiny()), plain)
    powers = next(n for n in model.graph.node if n.op_type == "Exp").output[0]
    port = helper.make_tensor_value_info(powers, TensorProto.FLOAT, ["b", 3, "s", "s"])
    model.graph.output.append(port)
    graph = join_softmax(load(save(model, tmp_path)))
    kinds = [n.op_type for n in graph.nodes]
    assert {"Exp", "Sub", "ReduceMax", "Softmax"} <= set(kinds)
    assert "ReduceSum" not in kinds
