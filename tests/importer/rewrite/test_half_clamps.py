"""Clamps of T5 in float16, which the same model in float32 does not have."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.load import load
from slmtvm.importer.rewrite.half_clamps import drop_half_clamps
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.rewrite.test_half_precision import TOLERANCE, in_halves
from tests.importer.test_import_spellings import op_names

TINY = Tiny(rope="rotate_half", layers=2)
MOST = 65504.0  # the largest float16


def bounds(
    nodes: list[onnx.NodeProto],
    x: str,
    *,
    most: float = MOST,
    of: str = "",
    half: bool = True,
    whole: bool = True,
) -> tuple[str, str]:
    """-c and c, where c is ``most``, or 64504 where ``of`` (by default x) has infinities."""

    def add(kind: str, *inputs: str, **attrs: object) -> str:
        name = f"{x}.{kind}.{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attrs))
        return name

    def number(value: float, dtype: type = np.float32) -> str:
        return add("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    infinite = add("IsInf", add("Cast", of or x, to=TensorProto.DOUBLE))
    axes = [] if whole else [add("Constant", value_ints=[-1])]
    keep = int(not whole)
    count = add("ReduceSum", add("Cast", infinite, to=TensorProto.INT64), *axes, keepdims=keep)
    found = add("Greater", count, number(0, np.int64))
    c = add("Where", found, number(64504.0), number(most))
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    return add("Cast", add("Neg", c), to=to), add("Cast", c, to=to)


def by_clip(nodes: list[onnx.NodeProto], x: str, y: str, **options) -> None:
    nodes.append(helper.make_node("Clip", [x, *bounds(nodes, x, **options)], [y], name=f"{y}.clip"))


def by_max_and_min(nodes: list[onnx.NodeProto], x: str, y: str, **options) -> None:
    low, high = bounds(nodes, x, **options)
    nodes.append(helper.make_node("Min", [x, high], [f"{y}.low"]))
    nodes.append(helper.make_node("Max", [low, f"{y}.low"], [y], name=f"{y}.max"))


def clamped(model: onnx.ModelProto, write=by_clip, **options) -> onnx.ModelProto:
    """``model`` with what each residual addition makes clamped."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        y = node.output[0]
        residual = any(n.op_type == "Pow" and y in n.input for n in model.graph.node)
        if node.op_type == "Add" and residual:
            node.output[0] = f"{y}.sum"
            write(nodes, f"{y}.sum", y, **options)
    assert len(nodes) > len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def halves(model: onnx.ModelProto, folder: Path, **options) -> tuple[Path, Path]:
    """In float16 with clamps, and with the same numbers in float32 without."""
    half, same = in_halves(model, TensorProto.FLOAT16)
    path = save(clamped(half, **options), folder)
    return path, save(same, folder, "float32.onnx")


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in drop_half_clamps(load(path)).nodes)


@pytest.mark.parametrize("whole", [True, False], ids=["of all", "of a row"])
@pytest.mark.parametrize("write", [by_clip, by_max_and_min], ids=lambda f: f.__name__)
def test_a_clamp_that_only_an_overflow_meets_is_no_step(write, whole, tmp_path):
    path, same = halves(build(TINY), tmp_path, write=write, whole=whole)
    model = import_onnx(path, context=32)
    assert op_names(model) == op_names(import_onnx(same, context=32))
    tokens = np.random.default_rng(1).integers(0, TINY.vocab, 20)
    want = run_onnxruntime(same, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_nothing_is_left_of_a_dropped_clamp(tmp_path):
    path, _ = halves(build(TINY), tmp_path)
    assert not {"IsInf", "Where", "Clip"} & operators(path).keys()


KEPT = {
    "a bound that finite values meet": {"most": 65440.0},
    "a tight bound": {"most": 1.0},
    "infinities of another value": {"of": "embedding.weight"},
}


@pytest.mark.parametrize("what", KEPT)
def test_other_clamps_are_kept_and_refused_where_they_mix_positions(what, tmp_path):
    path, _ = halves(build(TINY), tmp_path, **KEPT[what])
    assert operators(path)["Clip"] == 4
    if what != "infinities of another value":  # of a constant: these are known
        with pytest.raises(UnsupportedOpError, match=r"different positions|not recognised"):
            import_onnx(path, context=32)


def test_a_clamp_of_float32_is_kept(tmp_path):
    path = save(clamped(build(TINY), half=False), tmp_path)
    assert operators(path)["Clip"] == 4


@pytest.mark.parametrize("bound", [0.5, 64504.0, MOST])
def test_a_clamp_with_constant_bounds_is_computed(bound, tmp_path):
    """Bounds that finite values meet are part of what a graph computes."""

    def write(nodes: list[onnx.NodeProto], x: str, y: str) -> None:
        nodes.append(helper.make_node("Clip", [x, "low", "high"], [y]))

    half, same = (clamped(m, write) for m in in_halves(build(TINY), TensorProto.FLOAT16))
    for model, dtype in ((half, np.float16), (same, np.float32)):
        for name, value in (("low", -bound), ("high", bound)):
            constant = numpy_helper.from_array(np.array(value, dtype), name)
            model.graph.initializer.append(constant)
    tokens = np.random.default_rng(1).integers(0, TINY.vocab, 20)
    want = run_onnxruntime(save(same, tmp_path, "float32.onnx"), tokens)
    got = evaluate(import_onnx(save(half, tmp_path), context=32), tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
