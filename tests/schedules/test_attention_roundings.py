"""Attention on scores and probabilities that are rounded computes its reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules.attention import reference as ref
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.attention_cases import attention_shape, constants, with_bias
from tests.schedules.harness import run

# Products are whole numbers: thirds of them are no ties, whatever the last bit.
SCORES = (1.0, 3.0, -20, 20)
COARSER = (0.5, 4.0, -8, 9)
WEIGHTS = (1.0, 1 / 255, 0, 255)
SHARED = (254 / 255, 1 / 255, 0, 255)
HALVED = (0.5, 1 / 64, 0, 20)
SUMS = (1.0, 0.7, -9, 13)
COARSER_SUMS = (1.0, 1.9, -4, 6)


@pytest.mark.parametrize("target_name", EVERY_TARGET)
@pytest.mark.parametrize(
    ("roundings", "weights"),
    [
        ((SCORES,), (WEIGHTS,)),
        ((SCORES, COARSER), ()),
        ((), (WEIGHTS,)),
        ((), (SHARED,)),
        ((), (SHARED, HALVED)),
    ],
    ids=["both", "scores twice", "probabilities", "probabilities times a number", "and twice"],
)
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_rounded_attention_computes_its_reference(
    mask: str,
    roundings: tuple[tuple[float, float, int, int], ...],
    weights: tuple[tuple[float, float, int, int], ...],
    target_name: str,
) -> None:
    shape = attention_shape(
        5, 4, 2, 24, 0, mask=mask, roundings=roundings, weight_roundings=weights
    )
    rng = np.random.default_rng(0)
    inputs = {
        t.name: rng.integers(-3, 4, t.shape).astype(np.float32) for t in (shape.q, *shape.cache)
    } | constants(shape)
    scalar = 9 if mask == "causal" else 5
    got = run(
        attention.build_attend(shape), inputs, Target.load(target_name),
        position=scalar, valid=scalar, cuts=(1,),
    )  # fmt: skip
    want = ref.attend(shape, inputs, scalar)
    np.testing.assert_allclose(got["o"], want, rtol=0, atol=1e-5)
    plain = attention_shape(5, 4, 2, 24, 0, mask=mask)
    assert np.abs(ref.attend(plain, inputs, scalar) - want).max() > 1e-3


@pytest.mark.parametrize("target_name", EVERY_TARGET)
def test_capped_scores_are_rounded_before_and_after_the_cap(target_name: str) -> None:
    shape = attention_shape(
        5, 4, 2, 24, 0, roundings=(SCORES,), softcap=2.0, sum_roundings=((1.0, 0.3, -5, 6),)
    )
    rng = np.random.default_rng(0)
    inputs = {
        t.name: rng.integers(-3, 4, t.shape).astype(np.float32) for t in (shape.q, *shape.cache)
    } | constants(shape)
    got = run(
        attention.build_attend(shape), inputs, Target.load(target_name), position=19, cuts=(1,)
    )
    want = ref.attend(shape, inputs, 19)
    np.testing.assert_allclose(got["o"], want, rtol=0, atol=1e-5)
    for plain in (replace(shape, softcap=9.0), replace(shape, sum_roundings=())):
        assert np.abs(ref.attend(plain, inputs, 19) - want).max() > 1e-3


@pytest.mark.parametrize("target_name", EVERY_TARGET)
@pytest.mark.parametrize("sums", [(SUMS,), (SUMS, COARSER_SUMS)], ids=["once", "twice"])
@pytest.mark.parametrize("by_key", [True, False], ids=["key", "distance"])
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_scores_are_rounded_with_their_bias(
    mask: str, by_key: bool, sums: tuple[tuple[float, float, int, int], ...], target_name: str
) -> None:
    plain = attention_shape(5, 4, 2, 24, 0, mask=mask, roundings=(SCORES,))
    shape = replace(with_bias(plain, by_key=by_key), sum_roundings=sums)
    rng = np.random.default_rng(0)
    inputs = {
        t.name: rng.integers(-3, 4, t.shape).astype(np.float32)
        for t in (shape.q, *shape.cache, *shape.bias)
    } | constants(shape)
    scalar = 19 if mask == "causal" else 5
    got = run(
        attention.build_attend(shape), inputs, Target.load(target_name),
        position=scalar, valid=scalar, cuts=(1,),
    )  # fmt: skip
    want = ref.attend(shape, inputs, scalar)
    np.testing.assert_allclose(got["o"], want, rtol=0, atol=1e-5)
    moved = {**inputs, "bias": inputs["bias"] + np.float32(0.3)}
    assert np.abs(ref.attend(shape, moved, scalar) - want).max() > 1e-3
