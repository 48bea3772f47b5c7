"""Rows of the token table, whatever is done to their integers or to the ids that choose them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from tests.importer.graph_builder import save
from tests.importer.graphs import build
from tests.importer.quantized import TINY, check
from tests.importer.test_import_spellings import calls_of
from tests.models.corpus import corpus_path

VOCAB, WIDTH = 53, 40


def lookup_of(model: onnx.ModelProto) -> tuple[onnx.NodeProto, int]:
    (node,) = (n for n in model.graph.node if n.input and n.input[0] == "embedding.weight")
    return node, list(model.graph.node).index(node)


def replace_lookup(model: onnx.ModelProto, nodes: list[onnx.NodeProto], **constants) -> None:
    """``nodes`` in the place of the lookup, whose result is called "rows"."""
    node, place = lookup_of(model)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    nodes.append(helper.make_node("Identity", ["rows"], list(node.output)))
    model.graph.node.remove(node)
    for offset, new in enumerate(nodes):
        model.graph.node.insert(place + offset, new)


def looked_up(table: str, to: int | None = TensorProto.FLOAT) -> list[onnx.NodeProto]:
    nodes = [helper.make_node("Gather", [table, "input_ids"], [f"{table}.rows"])]
    if to is not None:
        nodes.append(helper.make_node("Cast", [f"{table}.rows"], [f"{table}.floats"], to=to))
    return nodes


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("scale", ["of each row", "of each column", "one", "vector of rows"])
@pytest.mark.parametrize("zero", ["", "of each row", "one"])
def test_integers_of_a_table_times_scales_stay_integers(dtype, scale, zero, tmp_path):
    rng = np.random.default_rng(2)
    model = build(TINY)
    middle = 128 if dtype == np.uint8 else 0
    levels = (rng.integers(-128, 128, (VOCAB, WIDTH)) + middle).astype(dtype)
    shapes = {"of each row": (VOCAB, 1), "of each column": (WIDTH,), "one": (), "": (),
              "vector of rows": (VOCAB,)}  # fmt: skip
    scales = ((0.5 + rng.random(shapes[scale])) / 80).astype(np.float32)
    zeros = (middle + rng.integers(-3, 4, shapes[zero])).astype(dtype)
    nodes, value = looked_up("levels"), "levels.floats"
    constants = {"levels": levels, "scales": scales}
    if zero == "of each row":
        constants["zeros"] = zeros
        nodes += [*looked_up("zeros"), helper.make_node("Sub", [value, "zeros.floats"], ["less"])]
        value = "less"
    elif zero:
        constants["zeros"] = zeros.astype(np.float32)
        nodes.append(helper.make_node("Sub", [value, "zeros"], ["less"]))
        value = "less"
    factor = "scales"
    if scale in ("of each row", "vector of rows"):
        nodes += looked_up("scales", None)
        factor = "scales.rows"
    if scale == "vector of rows":
        constants["last"] = np.array([-1])
        nodes.append(helper.make_node("Unsqueeze", [factor, "last"], ["column"]))
        factor = "column"
    nodes.append(helper.make_node("Mul", [factor, value], ["rows"]))
    replace_lookup(model, nodes, **constants)
    imported = check(save(model, tmp_path))
    (call,) = calls_of(imported, "slm.embedding")
    fits = not (scale == "of each column" and zero == "of each row")
    assert (str(call.attrs["format"]) == "int8") == fits


def altered(model: onnx.ModelProto, how: str) -> None:
    """The ids as encoders take them: hidden ones made 0, or all kept within the table."""
    node, place = lookup_of(model)
    constants = {"least": np.array(0), "most": np.array(VOCAB - 1), "zero": np.array(0)}
    nodes = {
        "times mask": [helper.make_node("Mul", ["input_ids", "attention_mask"], ["ids"])],
        "where": [
            helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.BOOL),
            helper.make_node("Where", ["seen", "input_ids", "zero"], ["ids"]),
        ],
        "clip": [helper.make_node("Clip", ["input_ids", "least", "most"], ["ids"])],
        "all": [
            helper.make_node("Mul", ["input_ids", "attention_mask"], ["masked"]),
            helper.make_node("Max", ["masked", "least"], ["above"]),
            helper.make_node("Min", ["above", "most"], ["ids"]),
        ],
        "clip too low": [helper.make_node("Clip", ["input_ids", "least", "low"], ["ids"])],
        "shifted": [helper.make_node("Add", ["input_ids", "one"], ["ids"])],
    }[how]
    constants |= {"low": np.array(VOCAB - 2), "one": np.array(1)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"])
    model.graph.input.append(mask)
    node.input[1] = "ids"
    for offset, new in enumerate(nodes):
        model.graph.node.insert(place + offset, new)


@pytest.mark.parametrize("how", ["times mask", "where", "clip", "all"])
def test_ids_that_come_out_as_they_were_choose_rows(how, tmp_path):
    model = build(TINY)
    altered(model, how)
    check(save(model, tmp_path))


@pytest.mark.parametrize("how", ["clip too low", "shifted"])
def test_ids_of_which_one_is_changed_are_refused(how, tmp_path):
    model = build(TINY)
    altered(model, how)
    with pytest.raises(UnsupportedOpError, match="rows by something other than the token ids"):
        import_onnx(save(model, tmp_path), context=32)


def test_masks_may_change_the_ids_of_hidden_tokens(tmp_path):
    model = onnx.load(corpus_path("bert-optimum"))
    (node,) = (n for n in model.graph.node if n.op_type == "Gather" and n.input[1] == "input_ids")
    node.input[1] = "ids"
    masked = helper.make_node("Mul", ["input_ids", "attention_mask"], ["ids"])
    model.graph.node.insert(0, masked)
    imported = import_onnx(save(model, tmp_path), context=32, mask="arbitrary")
    assert imported.mask == "keys"
