"""Bounds and guards inside what recognisers take for a whole: steps of their own, or refused.

The numbers on which recognisers try a graph are near one, and these bounds are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import insert_after, run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.test_import_spellings import op_names

TOKENS = np.random.default_rng(1).integers(0, Tiny().vocab, 23)
TOLERANCE = 2e-5  # of the logits' range
BOUND = 8.0
LARGE = 40.0  # what makes activations that are near one reach the bound

Write = Callable[[str, str], list[NodeProto]]


def number(value: float) -> NodeProto:
    tensor = numpy_helper.from_array(np.float32(value))
    return helper.make_node("Constant", [], [f"number_{value}"], value=tensor)


def with_numbers(kind: str, x: str, y: str, *numbers: float) -> list[NodeProto]:
    constants = [number(value) for value in numbers]
    names = [node.output[0] for node in constants]
    return [*constants, helper.make_node(kind, [x, *names], [y])]


def clip(x: str, y: str) -> list[NodeProto]:
    return with_numbers("Clip", x, y, -BOUND, BOUND)


def least(x: str, y: str) -> list[NodeProto]:
    return with_numbers("Min", x, y, BOUND)


def most(x: str, y: str) -> list[NodeProto]:
    return with_numbers("Max", x, y, -BOUND)


def replaced(x: str, y: str) -> list[NodeProto]:
    """Large numbers are another one."""
    return [
        number(BOUND),
        helper.make_node("Greater", [x, f"number_{BOUND}"], [f"{y}_large"]),
        helper.make_node("Where", [f"{y}_large", f"number_{BOUND}", x], [y]),
    ]


def whole(x: str, y: str) -> list[NodeProto]:
    """Through integers and back."""
    return [
        helper.make_node("Cast", [x], [f"{y}_whole"], to=TensorProto.INT32),
        helper.make_node("Cast", [f"{y}_whole"], [y], to=TensorProto.FLOAT),
    ]


def guard(x: str, y: str) -> list[NodeProto]:
    """0 where there is no number: torch.export's softmax of a row that sees nothing."""
    return [
        number(0.0),
        helper.make_node("IsNaN", [x], [f"{y}_nan"]),
        helper.make_node("Where", [f"{y}_nan", "number_0.0", x], [y]),
    ]


def outputs(model: onnx.ModelProto, kind: str) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == kind]


def scale_weight(model: onnx.ModelProto, reader: str, factor: float) -> None:
    """The weight of the node that makes ``reader``, times ``factor``."""
    node = next(n for n in model.graph.node if reader in n.output)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    array = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def check(model: onnx.ModelProto, folder: Path) -> CanonicalModel:
    """Import the model and compare it with onnxruntime."""
    path = save(model, folder)
    want = run_onnxruntime(path, TOKENS)
    imported = import_onnx(path, context=48)
    assert np.abs(evaluate(imported, TOKENS) - want).max() <= TOLERANCE * np.ptp(want)
    return imported


QKV = {"query": 0, "key": 1, "value": 2}


@pytest.mark.parametrize("bound", [clip, least, most])
@pytest.mark.parametrize("at", ["projection", "heads"])
@pytest.mark.parametrize("of", QKV)
def test_a_bound_before_the_rotation_stays(of, at, bound, tmp_path):
    model = build(Tiny(rope="rotate_half"))
    projected = outputs(model, "MatMul")[QKV[of]]
    scale_weight(model, projected, LARGE)
    insert_after(
        model, projected if at == "projection" else outputs(model, "Transpose")[QKV[of]], bound
    )
    names = op_names(check(model, tmp_path))
    assert names.count("slm.rope") == 2
    assert {"relax.minimum", "relax.maximum"} & set(names)


@pytest.mark.parametrize("rope", ["rotate_half", "interleaved", "partial"])
def test_a_bound_of_all_three_at_once_stays(rope, tmp_path):
    """clip_qkv, as OLMo, DBRX and MPT have it."""
    model = build(Tiny(rope=rope, packed_qkv="parts"))
    packed = outputs(model, "MatMul")[0]
    scale_weight(model, packed, LARGE)
    insert_after(model, packed, clip)
    assert op_names(check(model, tmp_path)).count("slm.rope") == 2


@pytest.mark.parametrize("norm", ["rms_rsqrt", "layer_without_beta"])
def test_a_bound_on_what_a_norm_multiplies_by_is_no_epsilon(norm, tmp_path):
    model = build(Tiny(norm=norm))
    table = next(t for t in model.graph.initializer if t.name == "embedding.weight")
    array = numpy_helper.to_array(table) * np.float32(1e-2)
    table.CopyFrom(numpy_helper.from_array(array, table.name))
    insert_after(model, outputs(model, "Reciprocal")[0], clip)
    names = op_names(check(model, tmp_path))
    assert sum(name in ("slm.rms_norm", "slm.layer_norm") for name in names) == 2


def test_a_bound_that_a_norm_can_not_reach_goes(tmp_path):
    """A variance is not negative, and with epsilon its root is never small."""
    model = build(Tiny(norm="layer_without_beta"))
    insert_after(
        model, outputs(model, "ReduceMean")[1], lambda x, y: with_numbers("Max", x, y, 0.0)
    )
    insert_after(model, outputs(model, "Sqrt")[0], lambda x, y: with_numbers("Clip", x, y, 1e-3))
    names = op_names(check(model, tmp_path))
    assert names.count("slm.layer_norm") == 3
    assert "relax.maximum" not in names


@pytest.mark.parametrize("write", [clip, least, most, replaced, whole])
@pytest.mark.parametrize("of", ["scores", "capped scores"])
def test_a_bound_on_scores_is_refused_by_name(of, write, tmp_path):
    model = build(Tiny(softcap=30.0 if of == "capped scores" else 0.0))
    scale_weight(model, outputs(model, "MatMul")[0], LARGE)
    insert_after(model, outputs(model, "MatMul")[3], write)
    with pytest.raises(UnsupportedOpError, match="softmax"):
        import_onnx(save(model, tmp_path), context=48)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: with_numbers("Clip", x, y, 1e-5, 1.0),
        lambda x, y: with_numbers("Min", x, y, 0.999999),
        whole,
    ],
)
def test_a_bound_on_probabilities_is_refused_by_name(write, tmp_path):
    model = build(Tiny())
    insert_after(model, outputs(model, "Softmax")[0], write)
    with pytest.raises(UnsupportedOpError, match="softmax is changed"):
        import_onnx(save(model, tmp_path), context=48)


def test_probabilities_that_are_averaged_over_neighbours_are_refused(tmp_path):
    """All but the outermost keys: numbers at even distances would not show it."""
    model = build(Tiny())

    def write(x: str, y: str) -> list[NodeProto]:
        ends = {"first": (0, 1), "before": (0, -2), "after": (2, 1 << 62), "last": (-1, 1 << 62)}
        nodes = [
            helper.make_node("Constant", [], ["axis"], value_ints=[3]),
            *(
                helper.make_node("Constant", [], [f"end_{end}"], value_ints=[end])
                for end in {end for pair in ends.values() for end in pair}
            ),
        ]
        for name, (begin, end) in ends.items():
            inputs = [x, f"end_{begin}", f"end_{end}", "axis"]
            nodes.append(helper.make_node("Slice", inputs, [name]))
        nodes.append(helper.make_node("Mean", ["before", "after"], ["between"]))
        nodes.append(helper.make_node("Concat", ["first", "between", "last"], [y], axis=3))
        return nodes

    insert_after(model, outputs(model, "Softmax")[0], write)
    with pytest.raises(UnsupportedOpError):
        import_onnx(save(model, tmp_path), context=48)


@pytest.mark.parametrize("write", [guard, lambda x, y: with_numbers("Clip", x, y, 0.0, 1.0)])
def test_a_guard_that_probabilities_can_not_reach_goes(write, tmp_path):
    model = build(Tiny())
    insert_after(model, outputs(model, "Softmax")[0], write)
    names = op_names(check(model, tmp_path))
    assert not {"relax.minimum", "relax.maximum"} & set(names)


def test_a_guard_against_no_number_goes_and_a_bound_far_out_stays(tmp_path):
    model = build(Tiny(activation="relu"))
    insert_after(model, outputs(model, "Relu")[0], guard)
    assert "relax.maximum" not in op_names(check(model, tmp_path))
    far = build(Tiny(activation="relu"))
    insert_after(far, outputs(far, "Relu")[0], lambda x, y: with_numbers("Clip", x, y, -1e29, 1e29))
    assert "relax.minimum" in op_names(check(far, tmp_path))


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN])
def test_a_cast_to_a_narrower_type_does_not_pass_as_movement(kind, tmp_path):
    model = build(Tiny())
    insert_after(
        model,
        outputs(model, "MatMul")[0],
        lambda x, y: [
            helper.make_node("Cast", [x], [f"{y}_narrow"], to=kind),
            helper.make_node("Cast", [f"{y}_narrow"], [y], to=TensorProto.FLOAT),
        ],
    )
    model.opset_import[0].version = 19
    with pytest.raises(UnsupportedOpError, match="Cast node"):
        import_onnx(save(model, tmp_path), context=48)


def late(x: str, y: str) -> list[NodeProto]:
    """Ten positions in, one half is added: what none of the first positions shows."""
    return [
        number(9.0), number(0.5),
        helper.make_node("Constant", [], ["one"], value_int=1),
        helper.make_node("Constant", [], ["none"], value_int=0),
        helper.make_node("Shape", ["input_ids"], ["size"], start=1, end=2),
        helper.make_node("Squeeze", ["size"], ["length"]),
        helper.make_node("Range", ["none", "length", "one"], ["places"]),
        helper.make_node("Cast", ["places"], ["positions"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["positions", "number_9.0"], ["is_late"]),
        helper.make_node("Cast", ["is_late"], ["lateness"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["lateness", "number_0.5"], ["added"]),
        helper.make_node("Unsqueeze", ["added", "one"], ["column"]),
        helper.make_node("Add", [x, "column"], [y]),
    ]  # fmt: skip


@pytest.mark.parametrize("after", ["Gather", "Relu", "ReduceMean", "MatMul", "Sqrt"])
def test_what_begins_at_a_later_position_is_not_lost(after, tmp_path):
    model = build(Tiny(activation="relu", rope="rotate_half"))
    insert_after(model, outputs(model, after)[0], late)
    check(model, tmp_path)
