"""Every op on single elements, compiled in one model, against the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import slmtvm
from slmtvm.compiler import compile_model
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.ir.reference.elementwise import ELEMENTWISE
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.spellings import ACTIVATIONS, OTHER_ACTIVATIONS, mask_trilu

CONTEXT, HIDDEN, COLUMNS, PARTS = 24, 20, 6, 2


def _positive(b: GraphBuilder, x: str) -> str:
    return b.op("Add", b.op("Abs", x), b.constant(0.5))


def _on_positive(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, _positive(b, x))


def _unary(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, x)


def _with_vector(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, x, b.near(1, COLUMNS))


def _of_vector(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, b.near(1, COLUMNS), _positive(b, x))


def _with_rows(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, x, _positive(b, b.op("Sin", x)))


def _of_number(kind: str) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.op(kind, b.constant(1.5), _positive(b, x))


def _of_parts(kind: str, reduction: str) -> Callable[[GraphBuilder, str], str]:
    """Each part of a row with a number of that part, as norms of heads that are rounded are."""

    def function(b: GraphBuilder, x: str) -> str:
        parts = b.op("Reshape", x, b.ints(0, 0, PARTS, COLUMNS // PARTS))
        number = b.op(reduction, _positive(b, parts), b.ints(-1), keepdims=1)
        return b.op("Reshape", b.op(kind, parts, number), b.ints(0, 0, COLUMNS))

    return function


CASES: dict[str, Callable[[GraphBuilder, str], str]] = {
    **{name: f for name, (f, _) in ACTIVATIONS.items() if name != "gelu_half_precision"},
    **OTHER_ACTIVATIONS,
    **{k: _unary(k) for k in ("Abs", "Cos", "Erf", "Exp", "Neg", "Sigmoid", "Sin", "Softplus")},
    **{k: _unary(k) for k in ("Relu", "Tanh")},
    **{k: _on_positive(k) for k in ("Log", "Sqrt")},
    "Pow": lambda b, x: b.op("Pow", _positive(b, x), b.constant(1.7)),
    **{f"{k} vector": _with_vector(k) for k in ("Add", "Div", "Max", "Min", "Mul", "Sub")},
    **{f"vector {k}": _of_vector(k) for k in ("Div", "Pow", "Sub")},
    **{f"{k} rows": _with_rows(k) for k in ("Add", "Div", "Max", "Min", "Mul", "Sub")},
    **{f"number {k}": _of_number(k) for k in ("Div", "Pow", "Sub")},
    "Div parts": _of_parts("Div", "ReduceMax"),
    "Mul parts": _of_parts("Mul", "ReduceMean"),
    "Sub parts": _of_parts("Sub", "ReduceSum"),
    "Add parts": _of_parts("Add", "ReduceMin"),
}
VOCAB = COLUMNS * len(CASES)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)


def write(folder: Path) -> Path:
    """Attention, then every case on a projection of its own; its results are its own logits."""
    b = GraphBuilder(np.random.default_rng(0))
    length = b.op("Shape", "input_ids", start=1, end=2)
    x = b.op("Gather", b.constant(b.random.normal(size=(VOCAB, HIDDEN))), "input_ids")
    q, k, v = (b.op("MatMul", x, b.weight(HIDDEN, HIDDEN)) for _ in range(3))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    weights = b.op("Softmax", mask_trilu(b, scores, length), axis=-1)
    x = b.op("Add", x, b.op("MatMul", weights, v))
    total = ""
    for place, function in enumerate(CASES.values()):
        y = function(b, b.op("MatMul", x, b.weight(HIDDEN, COLUMNS)))
        own = np.zeros((COLUMNS, VOCAB))
        own[:, place * COLUMNS : (place + 1) * COLUMNS] = np.eye(COLUMNS)
        logits = b.op("MatMul", y, b.constant(own))
        total = b.op("Add", total, logits) if total else logits
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
    )
    return save(model, folder)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("elementwise"))


@pytest.fixture(scope="module")
def model(file: Path) -> CanonicalModel:
    return import_onnx(file, context=CONTEXT)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    for place, name in enumerate(CASES):
        own = slice(place * COLUMNS, (place + 1) * COLUMNS)
        error = np.abs(got[:, own] - wanted[:, own]).max()
        assert error <= 1e-5 * np.abs(wanted[:, own]).max(), name


def test_the_cases_hold_every_op_that_the_importer_emits(model: CanonicalModel) -> None:
    (block,) = model.module["main"].body.blocks
    emitted = {b.value.op.name for b in block.bindings if hasattr(b.value, "op")}
    assert set(ELEMENTWISE) <= emitted


def test_the_reference_computes_each_as_the_file_does(file: Path, model: CanonicalModel) -> None:
    assert_close(evaluate(model, TOKENS), run_onnxruntime(file, TOKENS))


@pytest.mark.slow
def test_the_bundle_computes_each_as_the_reference_does(
    file: Path, model: CanonicalModel, tmp_path: Path
) -> None:
    bundle = tmp_path / "b.slm"
    compile_model(file, output=bundle, context=CONTEXT, kv="f32")
    with slmtvm.load(bundle) as session:
        assert_close(session.eval_all(TOKENS), evaluate(model, TOKENS))
