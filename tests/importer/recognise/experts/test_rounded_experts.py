"""Mixtures of experts with activations rounded beforehand, against onnxruntime on the same file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.expert_roundings import among, parse
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.ops import operands
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.recognise.experts.test_experts import (
    EXPERTS,
    calls,
    choice_before_operator,
    conv_trimmed,
    gathered_matrices,
    loop_with_sums,
)

TOKENS = np.random.default_rng(3).integers(0, Tiny().vocab, 19)
EXACT = 1e-6  # of the logits' range
# A last bit of a float can turn a rounding elsewhere, which changes a row by a step.
FLIP = 3e-2
FORMS = {
    "products": {"quant_format": QuantFormat.QDQ, "op_types_to_quantize": ["MatMul"]},
    "everything": {"quant_format": QuantFormat.QDQ},
    "integers": {"quant_format": QuantFormat.QOperator},
    "signed": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QInt8},
    "sixteen bits": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt16},
}
AROUND_PRODUCTS = {"gate", "up", "hidden", "down"}


class Calibration(CalibrationDataReader):
    """A few random sequences, long enough for every expert to be chosen."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._left = [rng.integers(0, Tiny().vocab, (1, 40)) for _ in range(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"input_ids": self._left.pop()} if self._left else None


def quantized(block: Callable[..., str], folder: Path, form: str) -> Path:
    logging.getLogger().setLevel(logging.ERROR)
    source = save(build(Tiny(block=block)), folder, "float.onnx")
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, **FORMS[form]}
    quantize_static(source, folder / "quantized.onnx", Calibration(), **options)
    return folder / "quantized.onnx"


def check(path: Path) -> CanonicalModel:
    model = import_onnx(path, context=24)
    want = run_onnxruntime(path, TOKENS)
    errors = np.abs(evaluate(model, TOKENS) - want).max(axis=1) / np.ptp(want)
    assert np.median(errors) <= EXACT
    assert errors.max() <= FLIP
    return model


def tables(model: CanonicalModel) -> dict[str, np.ndarray]:
    """The roundings of the only mixture, by point."""
    (call,) = calls(model, "slm.moe")
    return {p: model.params[var.name] for p, var in among(operands(call)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_a_loop_have_roundings_of_their_own(form: str, tmp_path: Path) -> None:
    model = check(quantized(loop_with_sums, tmp_path, form))
    found = tables(model)
    assert found.keys() >= AROUND_PRODUCTS
    assert all(table.shape == (EXPERTS, 3) for table in found.values())
    assert len(set(found["down"][:, 0])) == EXPERTS
    assert [la.activation for la in model.layers if la.kind == "experts"] == ["static"] * 2
    if form != "products":
        assert found.keys() >= {"sigmoid", "activation", "weight", "weighted", "total"}


@pytest.mark.parametrize("form", FORMS)
def test_gathered_experts_have_roundings_and_weights_in_common(form: str, tmp_path: Path) -> None:
    model = check(quantized(gathered_matrices, tmp_path, form))
    found = tables(model)
    assert found.keys() >= AROUND_PRODUCTS
    assert all((table == table[0]).all() for table in found.values())
    (call,) = calls(model, "slm.moe")
    weights = "f32" if form == "sixteen bits" else "int8"
    assert call.attrs["up_format"] == call.attrs["down_format"] == weights


@pytest.mark.slow
def test_scores_and_their_sum_are_rounded_in_the_routing(tmp_path: Path) -> None:
    """Softmax before the choice is another function than after it once it is rounded."""
    model = check(quantized(loop_with_sums, tmp_path, "everything"))
    (call,) = calls(model, "slm.moe")
    assert (call.attrs["score"], call.attrs["normalize"]) == ("softmax", "sum")
    assert "scores" in parse(str(call.attrs["roundings"]))


@pytest.mark.parametrize("form", ["everything", "integers"])
def test_convolutions_may_be_rounded_before_they_are_trimmed(form: str, tmp_path: Path) -> None:
    model = check(quantized(conv_trimmed, tmp_path, form))
    assert len(calls(model, "slm.causal_conv")) == 1


def edited(folder: Path, form: str, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """A quantized loop over experts after another change."""
    model = onnx.load(quantized(loop_with_sums, folder, form))
    edit(model)
    return save(model, folder)


def last_product(model: onnx.ModelProto) -> onnx.NodeProto:
    """The last expert's second product."""
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    return products[-2]  # the last one is the head


def without_one(model: onnx.ModelProto) -> None:
    """One expert's product takes unrounded what the others take rounded."""
    makers = {o: n for n in model.graph.node for o in n.output}
    product = last_product(model)
    restored = makers[product.input[0]]
    product.input[0] = makers[restored.input[0]].input[0]


def restored_with_another(model: onnx.ModelProto) -> None:
    makers = {o: n for n in model.graph.node for o in n.output}
    restored = makers[last_product(model).input[0]]
    other = numpy_helper.from_array(np.array(0.5, np.float32), "other")
    model.graph.initializer.append(other)
    restored.input[1] = "other"


def rounded_twice(model: onnx.ModelProto) -> None:
    product = last_product(model)
    grid = [
        numpy_helper.from_array(np.array(0.5, np.float32), "grid.scale"),
        numpy_helper.from_array(np.array(0, np.int8), "grid.zero"),
    ]
    model.graph.initializer.extend(grid)
    names = [t.name for t in grid]
    place = list(model.graph.node).index(product)
    model.graph.node.insert(
        place, helper.make_node("DequantizeLinear", ["twice", *names], ["restored"])
    )
    model.graph.node.insert(
        place, helper.make_node("QuantizeLinear", [product.input[0], *names], ["twice"])
    )
    product.input[0] = "restored"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without_one, "that expert 4 has no counterpart of"),
        (restored_with_another, "and restores them with another"),
        (rounded_twice, "twice"),
    ],
)
def test_roundings_that_do_not_fit_are_refused_and_never_left_out(
    edit: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedOpError, match=f"constant scale {words}"):
        import_onnx(edited(tmp_path, "products", edit), context=24)


def test_a_choice_before_one_operator_may_not_be_rounded(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="around one operator"):
        import_onnx(quantized(choice_before_operator, tmp_path, "products"), context=24)
