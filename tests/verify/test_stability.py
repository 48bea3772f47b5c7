"""How far onnxruntime is from itself: nothing where nothing is rounded, much where all is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from slmtvm.verify import Figures, Limits, Reference, compare
from slmtvm.verify.stability import with_other_bits
from tests.models import heldout_ids, model_path
from tests.models.corpus import corpus_path
from tests.verify.sessions import ReferenceSession


def _own(form: str) -> float:
    reference = Reference(model_path(form))
    report = compare(
        ReferenceSession(reference), reference, heldout_ids()[:65], window=64, with_own=True
    )
    assert report.own is not None and report.own.kl_mean is not None
    assert f"onnxruntime from itself: KL divergence {report.own.kl_mean:.2g}" in str(report)
    assert report.to_json()["own"]["kl_mean"] == report.own.kl_mean
    return report.own.kl_mean


def test_a_float_model_is_near_to_itself_and_one_that_rounds_by_call_is_not() -> None:
    assert _own("float32") < 1e-6
    assert _own("int8") > 1e-4  # what comes later changes the range


@pytest.mark.slow
def test_a_difference_like_onnxruntimes_own_is_judged_by_it() -> None:
    reference = Reference(model_path("int8"))
    tokens = heldout_ids()[:33]

    class Stepwise(ReferenceSession):
        """Each row as the last one of its window: what comes later changes nothing."""

        def eval_all(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            rows = [self._reference.rows(tokens[: n + 1])[-1] for n in range(len(tokens))]
            return np.stack(rows)

    strict = Limits(max_kl=1e-7, min_cosine=1 - 1e-9, max_relative=1e-6)
    stepwise = compare(Stepwise(reference), reference, tokens, limits=strict)
    assert len(Figures.excess(stepwise, strict)) == 3  # beyond every limit
    assert stepwise.agrees(strict)
    distorted = ReferenceSession(reference, distort=lambda rows: -rows)
    assert not compare(distorted, reference, tokens, limits=strict).agrees(strict)


@pytest.mark.parametrize("cell", ["bert-optimum", "llama-script-masked"])
def test_an_encoder_and_masks_are_compared_with_themselves_too(cell: str) -> None:
    reference = Reference(corpus_path(cell))
    kind = "encoder" if cell.startswith("bert") else "decoder"
    session = ReferenceSession(
        reference, kind=kind, mask="keys", vocab_size=60, context=40, distort=lambda rows: -rows
    )
    report = compare(session, reference)
    assert report.own is not None and report.own.relative < 1e-5
    assert report.masked is not None and report.masked.own is not None
    assert report.masked.own.relative < 1e-5


@pytest.mark.parametrize("half", [False, True])
def test_half_of_the_floats_move_by_one_bit_towards_zero(half: bool) -> None:
    numbers = np.linspace(-2, 2, 1001, dtype=np.float32)
    model = onnx.ModelProto()
    model.graph.initializer.append(numpy_helper.from_array(numbers, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.arange(3), "i"))
    exponents = (np.float32(2), np.full((1,), 2, np.float32))
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(x)) for x in exponents)
    with_other_bits(model, np.random.default_rng(0), half=half)
    moved, integers, *same = map(numpy_helper.to_array, model.graph.initializer)
    assert [float(x.sum()) for x in same] == [2, 2]
    changed = moved != numbers
    assert 400 < changed.sum() < 600
    near = numbers * np.float32(1 - 2**-11) if half else np.nextafter(numbers, np.float32(0))
    assert np.array_equal(moved[changed], near[changed])
    assert integers.tolist() == [0, 1, 2]


@pytest.mark.slow
def test_how_far_both_are_from_the_float_model_is_shown() -> None:
    reference, float_model = Reference(model_path("int8")), Reference(model_path("float32"))
    session = ReferenceSession(float_model)
    report = compare(session, reference, heldout_ids()[:65], float_reference=float_model)
    assert report.from_float is not None and report.reference_from_float is not None
    assert report.from_float.kl_mean == 0
    assert report.reference_from_float.kl_mean is not None
    assert report.reference_from_float.kl_mean > 1e-3
    text = str(report)
    assert "bundle from the float model: KL divergence 0" in text
    assert "onnxruntime from the float model: KL divergence" in text
    assert {"from_float", "reference_from_float"} < set(report.to_json())
