"""Numbers that are added to rows or multiply them, wherever a pass may look, as in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import slmtvm
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.spellings import mask_trilu

CONTEXT, VOCAB, HIDDEN = 24, 40, 24
TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)


def write(folder: Path) -> Path:
    b = GraphBuilder(np.random.default_rng(0))

    def linear(x: str, k: int = HIDDEN, n: int = HIDDEN) -> str:
        # A layer without a bias would take the number for one.
        return b.op("Add", b.op("MatMul", x, b.weight(k, n)), b.near(0, n))

    def number(kind: str, x: str, value: float = 0.3, *, first: bool = False) -> str:
        constant = b.constant(value)
        return b.op(kind, constant, x) if first else b.op(kind, x, constant)

    length = b.op("Shape", "input_ids", start=1, end=2)
    table = b.constant(b.random.normal(size=(VOCAB, HIDDEN)))
    x = number("Add", number("Mul", b.op("Gather", table, "input_ids"), 1.5))
    q, k, v = (number("Add", linear(x)) for _ in range(3))
    scores = b.op("MatMul", number("Mul", q, 0.2), b.op("Transpose", k, perm=[0, 2, 1]))
    weights = b.op("Softmax", mask_trilu(b, scores, length), axis=-1)
    x = b.op("Add", number("Add", x), number("Add", linear(b.op("MatMul", weights, v))))
    # A layer's result: a number is added, then the rest; or to the rest; or neither is a layer's.
    x = b.op("Add", number("Add", linear(x), first=True), x)
    x = b.op("Add", linear(x), number("Add", x, first=True))
    x = b.op("Add", number("Mul", linear(x), 0.5), number("Sub", x, first=True))
    norm = b.op("LayerNormalization", number("Add", x), b.near(1, HIDDEN), b.near(0, HIDDEN))
    norm = number("Add", number("Mul", norm, 2.0, first=True))
    gate, up = number("Add", linear(norm, n=40)), number("Mul", linear(norm, n=40), 0.7)
    y = b.op("Mul", number("Mul", b.op("Relu", gate), 1.2), up)
    x = b.op("Add", x, number("Add", number("Div", linear(y, k=40), 3.0)))
    number("Add", number("Mul", linear(x, n=VOCAB), 0.5))
    b.nodes[-1].output[0] = "logits"
    model = b.model(
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
    )
    return save(model, folder)


@pytest.mark.slow
def test_numbers_stay_where_the_file_has_them(tmp_path: Path) -> None:
    file = write(tmp_path)
    slmtvm.compile(file, output=tmp_path / "b.slm", context=CONTEXT, kv="f32")
    wanted = run_onnxruntime(file, TOKENS)
    with slmtvm.load(tmp_path / "b.slm") as session:
        got = session.eval_all(TOKENS)
    assert np.abs(got - wanted).max() <= 2e-5 * np.ptp(wanted)
