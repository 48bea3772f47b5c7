"""How long a context may be: as long as the model's own tables, which are found by trying."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.spellings import BUCKETS

ROWS = 70
TOLERANCE = 1e-5  # of the logits' range


def agrees(path, model, length: int) -> bool:
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, length)
    want = run_onnxruntime(path, tokens)
    return np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_buckets_of_distances_that_begin_in_order_bound_nothing(tmp_path):
    path = save(build(Tiny(mask="by_causal_bucket")), tmp_path)
    model = import_onnx(path, context=3 * BUCKETS)
    assert (model.kind, model.context) == ("decoder", 3 * BUCKETS)
    assert agrees(path, model, 3 * BUCKETS)
    assert import_onnx(path).context == 1024


def read_by(op_type: str) -> onnx.ModelProto:
    """A table of ROWS positions that is read by another operator than Gather."""
    model = build(Tiny(learned_positions=ROWS))
    (node,) = (n for n in model.graph.node if n.input and n.input[0] == "positions.weight")
    table, places = node.input
    if op_type == "Gather":
        return model
    place = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    constants = {"last": np.array([-1]), "first": np.array([0]), "wide": np.array([1, 24])}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    column = helper.make_node("Unsqueeze", [places, "last"], ["column"])
    nodes = {
        "GatherND": [column, helper.make_node("GatherND", [table, "column"], list(node.output))],
        "GatherElements": [
            column,
            helper.make_node("Tile", ["column", "wide"], ["element"]),
            helper.make_node("GatherElements", [table, "element"], list(node.output), axis=0),
        ],
        "Slice": [
            helper.make_node("Shape", ["input_ids"], ["how_many"], start=1, end=2),
            helper.make_node("Slice", [table, "first", "how_many", "first"], list(node.output)),
        ],
    }[op_type]
    for offset, new in enumerate(nodes):
        model.graph.node.insert(place + offset, new)
    return model


@pytest.mark.parametrize("op_type", ["Gather", "GatherND", "GatherElements", "Slice"])
def test_a_table_of_positions_bounds_the_context_whatever_reads_it(op_type, tmp_path):
    path = save(read_by(op_type), tmp_path)
    model = import_onnx(path)
    assert model.context == ROWS
    assert agrees(path, model, ROWS)
    with pytest.raises(UnsupportedOpError, match=f"the model's own tables have {ROWS}"):
        import_onnx(path, context=ROWS + 30)


def of_length(model: onnx.ModelProto, length: int) -> onnx.ModelProto:
    """The model with inputs and outputs of a fixed batch of 1 and ``length``."""
    for port in (*model.graph.input, *model.graph.output):
        sizes = port.type.tensor_type.shape.dim
        for place, size in enumerate((1, length)):
            sizes[place].Clear()
            sizes[place].dim_value = size
    return model


def test_inputs_of_a_fixed_length_bound_the_context(tmp_path):
    path = save(of_length(build(Tiny(mask="none")), 16), tmp_path)
    model = import_onnx(path)
    assert (model.context, model.kind) == (16, "encoder")
    assert agrees(path, model, 16)
    dynamic = import_onnx(save(build(Tiny(mask="none")), tmp_path, "dynamic.onnx"))
    assert np.array_equal(evaluate(model, np.arange(9)), evaluate(dynamic, np.arange(9)))
    assert import_onnx(path, context=12).context == 12
    with pytest.raises(UnsupportedOpError, match=r"fixed length of 16, and 17 tokens are asked"):
        import_onnx(path, context=17)


def baked(tiny: Tiny, length: int) -> onnx.ModelProto:
    """A model whose first reshape takes ``length`` tokens alone."""
    model = build(tiny)
    reshape = next(n for n in model.graph.node if n.op_type == "Reshape")
    shape = next(t for t in model.graph.initializer if t.name == reshape.input[1])
    shape.CopyFrom(numpy_helper.from_array(np.array([1, length, 3, 8]), shape.name))
    return model


@pytest.mark.parametrize("mask", ["none", "trilu", "window"])
def test_a_length_that_the_graph_s_constants_hold_is_the_context(mask, tmp_path):
    path = save(of_length(baked(Tiny(mask=mask), 16), 16), tmp_path)
    model = import_onnx(path)
    assert model.context == 16
    assert agrees(path, model, 16)
    dynamic = import_onnx(save(build(Tiny(mask=mask)), tmp_path, "dynamic.onnx"))
    assert np.array_equal(evaluate(model, np.arange(9)), evaluate(dynamic, np.arange(9)))
    with pytest.raises(
        UnsupportedOpError, match=r"fixed length of 16, which the graph's own .*Res"
    ):
        import_onnx(path, context=12)


def test_inputs_that_say_any_length_where_the_graph_takes_one_are_refused(tmp_path):
    path = save(baked(Tiny(mask="none"), 16), tmp_path)
    with pytest.raises(UnsupportedOpError, match=r"takes 16 tokens and not 7, .* any: give them"):
        import_onnx(path, context=16)


def test_a_length_of_one_token_is_refused(tmp_path):
    with pytest.raises(UnsupportedOpError, match=r"fixed length of 1, and 4 or more tokens are"):
        import_onnx(save(of_length(build(Tiny()), 1), tmp_path))


def test_tokens_that_reach_no_output_are_named(tmp_path):
    model = build(Tiny())
    constant = numpy_helper.from_array(np.zeros((1, 1), np.int64), "same")
    model.graph.initializer.append(constant)
    for node in model.graph.node:
        if node.op_type == "Gather":
            node.input[:] = ["same" if i == "input_ids" else i for i in node.input]
    with pytest.raises(
        UnsupportedOpError, match=r"no output depends .* input 'input_ids', as wher"
    ):
        import_onnx(save(model, tmp_path))
