"""Rows of padding are left out by linear layers and attention, and change no other row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention.tile import rows_in_block
from slmtvm.schedules.linear import LinearShape, default_knobs, effective_knobs
from slmtvm.target import Target
from tests.machines import EVERY_TARGET
from tests.schedules.attention_cases import (
    attention_shape,
    cache,
    parameters,
    random_floats,
    with_bias,
)
from tests.schedules.harness import run
from tests.schedules.linear_cases import random_case

M = 47
SHAPES = [
    LinearShape(M, 33, 70, "f32", has_bias=True),
    LinearShape(M, 33, 96, "int4", "block", 32, has_residual=True),
    LinearShape(M, 33, 70, "int8", "row_u8", has_bias=True),
    LinearShape(M, 20, 64, "int4", group_size=32),
]


@pytest.fixture(params=EVERY_TARGET)
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kernel_name("", {}))
def test_rows_of_tokens_are_those_of_a_full_step_and_tiles_of_padding_are_zero(
    shape: LinearShape, target: Target
) -> None:
    isa = isas.get(target.isa)
    knobs = effective_knobs(shape, isa, default_knobs(shape, isa))
    case = random_case(shape, isa)
    full = case.run(target, isa, knobs)
    padded = replace(case, shape=replace(shape, padded=True))
    for valid in (knobs["mr"] + 1, 2 * knobs["mr"], M - 1):
        y = padded.run(target, isa, knobs, valid=valid)
        np.testing.assert_array_equal(y[:valid], full[:valid])
        tiles = -(-valid // knobs["mr"]) * knobs["mr"]
        assert (y[tiles:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_attention_of_tokens_is_that_of_a_full_step_and_blocks_of_padding_are_zero(
    mask: str, target: Target
) -> None:
    shape = with_bias(attention_shape(21, 6, 3, 20, mask=mask))
    shape = replace(shape, capacity=shape.capacity if shape.causal else 32)
    given = {"q": random_floats(*shape.q.shape, seed=1)}
    if shape.causal:
        given |= {**cache(shape, 61), **{t.name: parameters(shape)[t.name] for t in shape.bias}}
    else:
        given |= {t.name: random_floats(*t.shape, seed=2) for t in (*shape.bias, *shape.cache)}
    position = 40 if shape.causal else 0
    count = rows_in_block(shape)
    for valid in (1, count + 1, 20):
        full, padded = (
            run(attention.build_attend(s), given, target, position=position, valid=valid)["o"]
            for s in (shape, replace(shape, padded=True))
        )
        np.testing.assert_array_equal(padded[:valid], full[:valid])
        assert (padded[-(-valid // count) * count :] == 0).all()
