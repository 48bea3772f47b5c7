"""Attributes outside of what their operators allow, and those at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import slmtvm
from slmtvm.errors import InvalidModelError
from slmtvm.importer import import_onnx
from slmtvm.importer.expand.registry import registered_expansions
from slmtvm.importer.operators import MAX_OPSET, registered
from slmtvm.importer.operators.attributes import fault_of, range_of
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import TOKENS
from tests.importer.test_builder_graphs import CONTEXT, TOLERANCE, Built, import_checked, write
from tests.importer.test_import_spellings import calls_of


def attributes() -> set[tuple[str, str]]:
    """Every operator that the importer knows, with each of its attributes."""
    found: set[tuple[str, str]] = set()
    for entry in [*registered(), *registered_expansions()]:
        names = set(entry.attributes)
        for version in range(entry.since, MAX_OPSET + 1):
            if not entry.domain and onnx.defs.has(entry.op_type, version, ""):
                names |= onnx.defs.get_schema(entry.op_type, version, "").attributes.keys()
        found |= {(entry.op_type, name) for name in names}
    return found


def test_every_attribute_of_every_operator_has_a_range() -> None:
    assert not {pair for pair in attributes() if range_of(*pair) is None}


def test_every_default_of_an_operator_is_in_its_range() -> None:
    for entry in registered():
        if entry.domain or not onnx.defs.has(entry.op_type, entry.since, ""):
            continue
        for name, given in onnx.defs.get_schema(entry.op_type, entry.since, "").attributes.items():
            if given.default_value.type:
                default = helper.get_attribute_value(given.default_value)
                assert fault_of(entry.op_type, name, default) is None


def altered(name: str, value: object) -> onnx.ModelProto:
    """The builder's decoder with an attribute of every attention."""
    model = write(Built())
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return model


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("do_rotary", 2, "0 or 1"),
        ("do_rotary", -1, "0 or 1"),
        ("rotary_interleaved", 2, "0 or 1"),
        ("causal", 3, "0 or 1"),
        ("num_heads", 0, "an integer from 1 on"),
        ("kv_num_heads", -2, "an integer from 1 on"),
        ("local_window_size", -5, "an integer from -1 on"),
        ("scale", math.inf, "a finite number"),
        ("scale", math.nan, "a finite number"),
        ("softcap", -5.0, "a finite number from 0 on"),
        ("softcap", math.nan, "a finite number from 0 on"),
        ("smooth_softmax", 2, "-1, 0 or 1"),
    ],
)
@pytest.mark.parametrize("read", [import_onnx, slmtvm.inspect])
def test_a_value_out_of_its_range_names_the_node_and_the_attribute(
    name: str, value: float, needed: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = save(altered(name, value), tmp_path)
    with pytest.raises(InvalidModelError) as caught:
        read(path)
    text = str(caught.value)
    assert f"attribute {name!r} is {value!r}, where {needed} is needed" in text
    assert "GroupQueryAttention node" in text and str(path) in text


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        ("Gemm", "transB", 2), ("ReduceMean", "keepdims", 2), ("CumSum", "exclusive", -1),
        ("Cast", "to", 99), ("Cast", "to", 0), ("LayerNormalization", "epsilon", -1e-5),
        ("Elu", "alpha", math.nan), ("Conv", "group", 0), ("Conv", "strides", [0]),
        ("Conv", "pads", [-1, 0]), ("Gelu", "approximate", b"erf"), ("MatMulNBits", "N", 0),
        ("CausalConvWithState", "activation", b"relu"), ("ScatterND", "reduction", b"mean"),
        ("GatherBlockQuantized", "quantize_axis", 2), ("LpNormalization", "p", 3),
    ],
)  # fmt: skip
def test_ranges_end_where_they_should(op_type: str, name: str, value: object) -> None:
    assert fault_of(op_type, name, value) is not None


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-41, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 1.5, 1e-20, 1e-41])
def test_scores_of_any_scale_and_cap_are_as_onnxruntime_has_them(
    scale: float, softcap: float, tmp_path: Path
) -> None:
    attention = (("scale", scale), ("softcap", softcap))
    import_checked(Built(layers=1, attention=attention), tmp_path)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_written_out_scores_may_have_any_scale(
    scale: float, softcap: float, tmp_path: Path
) -> None:
    model = build(Tiny(rope="rotate_half", softcap=softcap))
    number = next(i for i in model.graph.initializer if i.name == scale_of(model))
    number.CopyFrom(numpy_helper.from_array(np.array(scale, np.float32), number.name))
    path = save(model, tmp_path)
    want = run_onnxruntime(path, TOKENS)
    imported = import_onnx(path, context=32)
    (call,) = calls_of(imported, "slm.attention")
    assert float(call.attrs["scale"]) == 1.0
    assert np.abs(evaluate(imported, TOKENS) - want).max() <= TOLERANCE * np.ptp(want)


def scale_of(model: onnx.ModelProto) -> str:
    """The constant that scores, a product of two values, are multiplied by."""
    made = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        left = made.get(node.input[0])
        scores = left is not None and left.op_type == "MatMul" and set(left.input) <= made.keys()
        if node.op_type == "Mul" and scores:
            return str(node.input[1])
    raise AssertionError("no scale")


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "softcap"), [(-0.3, 0.0), (0.0, 0.0), (-0.3, 1e-20)])
def test_a_bundle_computes_scores_of_any_scale(
    scale: float, softcap: float, tmp_path: Path
) -> None:
    path = save(write(Built(attention=(("scale", scale), ("softcap", softcap)))), tmp_path)
    slmtvm.compile(path, output=tmp_path / "b.slm", context=CONTEXT, kv="f32")
    want = run_onnxruntime(path, TOKENS)
    with slmtvm.load(tmp_path / "b.slm") as session:
        assert np.abs(session.eval_all(TOKENS) - want).max() <= TOLERANCE * np.ptp(want)
