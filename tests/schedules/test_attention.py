"""Attention kernels compute what their reference says; a row's bits never depend on its company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.attention import reference as ref
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target, known_targets
from tests.schedules.harness import run

CAPACITY = 128
# float32 sums of up to CAPACITY products of values of magnitude 1.
ABSOLUTE = 4e-6

Arrays = dict[str, np.ndarray]


def attention_shape(
    m: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int = 0, **fields: object
) -> AttentionShape:
    shape = AttentionShape(
        m, heads, kv_heads, head_dim, CAPACITY, head_dim**-0.5,
        rotary_dim=rotary_dim, table_rows=CAPACITY if rotary_dim else 0,
    )  # fmt: skip
    return replace(shape, **fields)  # type: ignore[arg-type]


def random_floats(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tables(shape: AttentionShape) -> Arrays:
    if not shape.rotary_dim:
        return {}
    half = shape.rotary_dim // 2
    angles = np.arange(CAPACITY)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def cache(shape: AttentionShape, position: int) -> Arrays:
    """Positions before ``position`` are filled; the others are not numbers, and may not matter."""
    keys, values = (random_floats(*t.shape, seed=i) for i, t in enumerate(shape.cache))
    lane = np.arange(CAPACITY).reshape(1, -1, 1, LANES)
    keys = np.where(lane < position, keys, np.float32(np.nan))
    values[:, position:] = np.nan
    return {"k_cache": keys, "v_cache": values}


def step(shape: AttentionShape, qkv: np.ndarray, kept: Arrays, position: int, target: Target,
         cuts: tuple[int, ...] = ()) -> Arrays:  # fmt: skip
    """q, o and the cache after the append and the attend kernel."""
    inputs = {"qkv": qkv, **tables(shape), **kept}
    appended = run(attention.build_append(shape), inputs, target, position=position, cuts=cuts)
    inputs = {name: appended[name] for name in ("q", "k_cache", "v_cache")}
    attended = run(attention.build_attend(shape), inputs, target, position=position, cuts=cuts)
    return {**inputs, "o": attended["o"]}


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


@pytest.fixture(params=known_targets())
def target(request: pytest.FixtureRequest) -> Target:
    return Target.load(request.param)


CASES = [
    (attention_shape(5, 4, 2, 40, 20, interleaved=True), 15),
    (attention_shape(3, 6, 2, 32, 32, accumulators=16), 100),
    (attention_shape(1, 7, 1, 80), 0),
]


@pytest.mark.parametrize(("shape", "position"), CASES, ids=lambda v: getattr(v, "m", v))
def test_a_step_computes_its_reference(
    shape: AttentionShape, position: int, target: Target
) -> None:
    qkv, kept = random_floats(*shape.qkv.shape, seed=3), cache(shape, position)
    got = step(shape, qkv, kept, position, target, cuts=(1, 2))
    want = ref.append(shape, {"qkv": qkv, **tables(shape), **kept}, position)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=ABSOLUTE, err_msg=name)
    expected = ref.attend(shape, got, position)
    np.testing.assert_allclose(got["o"], expected, atol=ABSOLUTE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "position"), [(32, 0), (40, 1), (64, 15), (80, 16), (64, 17), (40, 100)]
)
def test_head_sizes_at_positions_around_a_block(
    head_dim: int, position: int, target: Target
) -> None:
    shape = attention_shape(6, 6, 2, head_dim, head_dim)
    test_a_step_computes_its_reference(shape, position, target)


@pytest.mark.parametrize("rotary_dim", [0, 32])
def test_decoding_in_one_kernel_changes_no_bit(rotary_dim: int, target: Target) -> None:
    shape, position = attention_shape(1, 6, 2, 32, rotary_dim), 37
    qkv, kept = random_floats(*shape.qkv.shape, seed=3), cache(shape, position)
    two = step(shape, qkv, kept, position, target)
    kernel = attention.build_decode(shape)
    one = run(kernel, {"qkv": qkv, **tables(shape), **kept}, target, position=position, cuts=(1,))
    for name in ("o", "k_cache", "v_cache"):
        np.testing.assert_array_equal(bits(one[name]), bits(two[name]), err_msg=name)


def chunked(shape: AttentionShape, qkv: np.ndarray, start: int, chunk: int, accumulators: int,
            target: Target) -> Arrays:  # fmt: skip
    """All rows of ``qkv``, ``chunk`` at a time; outputs of all, and the cache at the end."""
    shape = replace(shape, m=chunk, accumulators=accumulators)
    kept, outputs = cache(shape, start), []
    for at in range(0, len(qkv), chunk):
        result = step(shape, qkv[at : at + chunk], kept, start + at, target)
        kept = {name: result[name] for name in ("k_cache", "v_cache")}
        outputs.append(result["o"])
    return {**kept, "o": np.concatenate(outputs)}


@pytest.mark.parametrize(
    ("chunk", "accumulators"), [(1, 4), (5, 4), (5, 16), (10, 16)], ids=lambda v: str(v)
)
def test_chunks_of_any_size_give_the_same_bits(chunk: int, accumulators: int) -> None:
    shape, host = attention_shape(10, 6, 2, 40, 40), Target.load("x86-64-v3")
    qkv = random_floats(10, shape.qkv.shape[1], seed=4)
    whole = chunked(shape, qkv, 11, 10, 4, host)
    parts = chunked(shape, qkv, 11, chunk, accumulators, host)
    for name, value in whole.items():
        np.testing.assert_array_equal(bits(parts[name]), bits(value), err_msg=name)


def test_a_bidirectional_row_sees_the_valid_positions_only(target: Target) -> None:
    shape = attention_shape(37, 4, 4, 32, mask="bidirectional", capacity=48)
    qkv, valid = random_floats(*shape.qkv.shape, seed=5), 21
    appended = run(attention.build_append(shape), {"qkv": qkv}, target, cuts=(5,))
    keys, values = (appended[t.name][...] for t in shape.cache)
    place = np.arange(48).reshape(1, -1, 1, LANES)
    inputs = {
        "q": appended["q"],
        "k_cache": np.where(place < valid, keys, np.float32(np.nan)),
        "v_cache": np.where(np.arange(48)[:, None] < valid, values, np.float32(np.nan)),
    }
    got = run(attention.build_attend(shape), inputs, target, valid=valid, cuts=(3,))["o"]
    np.testing.assert_allclose(got, ref.attend(shape, inputs, valid), atol=ABSOLUTE)
