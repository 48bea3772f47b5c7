"""A cache that keeps a window of positions computes what one of all positions does, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target
from tests.machines import runnable_targets
from tests.schedules.attention_cases import (
    CAPACITY,
    Arrays,
    attention_shape,
    bits,
    cache,
    parameters,
    projections,
    step,
    with_bias,
)
from tests.schedules.harness import run

HOST = Target.load("x86-64-v3")
ROWS = 7
SHAPES = {
    "window": attention_shape(ROWS, 4, 2, 40, window=21),
    "int8": attention_shape(
        ROWS, 4, 2, 40, 40, kv_dtype="int8", window=33, accumulators=16, queries=8
    ),
    "chunk": attention_shape(ROWS, 3, 3, 32, chunk=13, kv_dtype="float16"),
    "everything": with_bias(
        attention_shape(
            ROWS, 6, 2, 48, 32, separate=True, window=20, softcap=3.0, mask_positions=CAPACITY,
            weight_roundings=((1.0, 1 / 255, 0, 255),),
        )
    ),
}  # fmt: skip
POSITIONS = (57, CAPACITY - ROWS)  # within, and after several rounds


def in_a_ring(shape: AttentionShape) -> AttentionShape:
    return replace(shape, ring=attention.ring_of(shape.sight, ROWS, shape.capacity))


def folded(shape: AttentionShape, kept: Arrays, position: int) -> Arrays:
    """What of a cache of all positions a ring holds before a step at ``position``."""
    made = {t.name: np.full(t.shape, -77, t.dtype) for t in shape.cache}
    for place in range(max(0, position - shape.ring), position):
        slot = place % shape.ring
        for name, array in made.items():
            if name == "k_cache":
                array[:, slot // LANES, :, slot % LANES] = kept[name][
                    :, place // LANES, :, place % LANES
                ]
            else:
                array[:, slot] = kept[name][:, place]
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "window" else ()) for n in SHAPES]
)
def test_a_step_over_a_ring_has_the_bits_of_one_over_all_positions(name: str) -> None:
    whole = SHAPES[name]
    ring = in_a_ring(whole)
    assert 0 < ring.ring < whole.capacity
    given = projections(whole)
    for position in POSITIONS:
        kept = cache(whole, position)
        wanted = step(whole, given, kept, position, HOST)
        got = step(ring, given, folded(ring, kept, position), position, HOST, cuts=(1, 3))
        np.testing.assert_array_equal(bits(got["o"]), bits(wanted["o"]), err_msg=str(position))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_decoding_over_a_ring_has_these_bits_on_every_target(kv_heads: int) -> None:
    whole = replace(SHAPES["everything"], m=1, num_kv_heads=kv_heads, kv_dtype="int8")
    ring, position = in_a_ring(whole), 101
    given, kept = {**projections(whole), **parameters(whole)}, cache(whole, position)
    wanted = run(attention.build_decode(whole), {**given, **kept}, HOST, position=position)["o"]
    small = folded(ring, kept, position)
    for target in runnable_targets():
        shape = attention.suited(ring, isas.get(target.isa))
        got = run(attention.build_decode(shape), {**given, **small}, target, position=position)
        np.testing.assert_array_equal(bits(got["o"]), bits(wanted), err_msg=target.name)
    if kv_heads > 1:
        return
    kernel = attention.build_divided_scores(ring)
    scored = run(kernel, {**given, **small}, HOST, position=position, cuts=(1,))
    values = {n: scored[n] for n in ("scores", "v_cache", "v_scale")}
    kernel = attention.build_divided_values(ring)
    got = run(kernel, {**values, "numbers": given["numbers"]}, HOST, position=position)
    np.testing.assert_array_equal(bits(got["o"]), bits(wanted))


def test_a_ring_that_is_no_smaller_is_none() -> None:
    assert attention.ring_of(100, 16, 128) == 0
    assert attention.ring_of(17, 16, 128) == 48
