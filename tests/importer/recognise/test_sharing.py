"""What the importer shares, and what only looks alike."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from onnx import TensorProto, helper

from slmtvm.importer.graph import Constant, attribute_key
from slmtvm.importer.read.load import load
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.recognisers import recognise
from slmtvm.importer.recognise.steps import Param, QuantizeDequantize, Rescale, Rows
from slmtvm.importer.rewrite.merge import merge_duplicates
from tests.importer.graph_builder import save


def cover() -> Cover:
    return Cover(SimpleNamespace(producers={"y#rescaled": None}), "input_ids", recognise)  # type: ignore[arg-type]


def rescale(*steps: float, unit: float = 0.5) -> Rescale:
    return Rescale(Rows("x"), Param("steps", np.array(steps, np.float32)), unit)


def test_steps_that_compute_the_same_have_one_name() -> None:
    own = cover()
    assert own.add("x#rescaled", rescale(1, 2)) == own.add("x#rescaled", rescale(1, 2))
    assert len(own.steps) == 1


def test_steps_of_one_label_that_differ_have_names_of_their_own() -> None:
    own = cover()
    others = [rescale(1, 2), rescale(1, 3), rescale(1, 2, unit=0.25), rescale(1, 2, 3)]
    others.append(QuantizeDequantize(Rows("x"), 0.5, -128, 127))
    names = [own.add("x#rescaled", step) for step in others]
    assert len(set(names)) == len(others)
    assert [own.steps[name] for name in names] == others


def test_no_step_takes_the_name_of_a_value_of_the_graph() -> None:
    assert cover().add("y#rescaled", rescale(1)) == "y#rescaled.1"


def test_attributes_are_equal_where_they_say_the_same() -> None:
    small = np.array([1.0, 2.0], np.float32)
    values = [
        1, 1.0, -0.0, 0.0, (1, 2), (1.0, 2.0), "1",
        Constant.of("a", small), Constant.of("a", small.astype(np.float64)),
        Constant.of("a", small[None]), Constant.of("a", -small),
        Constant("a", np.array([1, 2], np.uint8), np.dtype("u1"), packed=(2, 2)),
        Constant("a", np.array([1, 2], np.uint8), np.dtype("i1"), packed=(2, 2), signed=True),
    ]  # fmt: skip
    assert len({attribute_key(value) for value in values}) == len(values)
    assert attribute_key(Constant.of("b", small.copy())) == attribute_key(values[7])


def test_nodes_of_two_operator_sets_stay_two(tmp_path) -> None:
    """Softmax ran over all axes from the given one on until operator set 13."""
    function = helper.make_function(
        "local", "Old", ["x"], ["y"], [helper.make_node("Softmax", ["x"], ["y"], axis=1)],
        [helper.make_opsetid("", 11)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Softmax", ["x"], ["new"], axis=1),
        helper.make_node("Softmax", ["x"], ["again"], axis=1),
        helper.make_node("Old", ["x"], ["old"], domain="local"),
        helper.make_node("Sum", ["new", "again", "old"], ["y"]),
    ]
    port = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "test", port[:1], port[1:]), functions=[function],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("local", 1)],
    )  # fmt: skip
    merged = merge_duplicates(load(save(model, tmp_path)))
    assert sorted(node.version for node in merged.nodes if node.op_type == "Softmax") == [11, 18]
