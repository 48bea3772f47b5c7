"""Shapes, inputs and runs of attention kernels, for the tests of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slmtvm.schedules import attention
from slmtvm.schedules.attention import BIAS_MARGIN, HIDDEN_SCORE, AttentionShape
from slmtvm.schedules.attention import reference as ref
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target
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


def with_bias(shape: AttentionShape, *, by_key: bool = False) -> AttentionShape:
    """``shape`` with a bias for all distances, or all keys, that its capacity has."""
    if by_key:
        return replace(shape, bias_columns=shape.capacity, bias_by_key=True)
    visible = shape.capacity if shape.causal else 2 * shape.capacity - 1
    return replace(shape, bias_columns=visible + BIAS_MARGIN, bias_zero=shape.capacity - 1)


def random_floats(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tables(shape: AttentionShape) -> Arrays:
    """cos and sin, where the shape has a rotation."""
    if not shape.rotary_dim:
        return {}
    half = shape.rotary_dim // 2
    angles = np.arange(CAPACITY)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def parameters(shape: AttentionShape) -> Arrays:
    """Everything that a kernel of ``shape`` reads of the model: tables, gammas, bias, numbers."""
    drawn = {
        t.name: random_floats(*t.shape, seed=7) for t in (*shape.gammas, *shape.bias, *shape.sinks)
    }
    if shape.bias_columns and not shape.bias_by_key:
        # What is ahead of a causal row may be anything.
        drawn["bias"][:, shape.bias_zero + 1 if shape.causal else shape.bias_columns :] = np.nan
    if shape.limits:
        drawn["limits"] = limits(random_visible(shape.mask_positions))
    # Products of a head are of the size of its features.
    drawn |= {
        t.name: random_floats(*t.shape, seed=i) * np.float32(shape.whole**-0.5)
        for i, t in enumerate(shape.bases)
    }
    return {**tables(shape), **drawn, **constants(shape)}


def constants(shape: AttentionShape) -> Arrays:
    """The numbers of the shape's roundings, where it has any."""
    values = np.array([*shape.numbers.values()], np.float32)
    return {t.name: values for t in shape.constants}


def random_visible(positions: int) -> np.ndarray:
    """Which positions are visible, bool: none of the first few, then two of three."""
    visible = np.random.default_rng(9).random(positions) < 2 / 3
    visible[:3] = False
    return visible


def limits(visible: np.ndarray) -> np.ndarray:
    return np.where(visible, np.float32(np.inf), np.float32(HIDDEN_SCORE))


def projections(shape: AttentionShape, seed: int = 3) -> Arrays:
    """What the linear layers computed."""
    return {t.name: random_floats(*t.shape, seed=seed) for t in shape.projections}


def cache(shape: AttentionShape, position: int) -> Arrays:
    """Positions before ``position`` are filled; the others are not numbers, and may not matter."""
    if shape.kv_dtype in ("int8", "int4"):
        return integer_cache(shape, position)
    keys, values = (random_floats(*t.shape, seed=i) for i, t in enumerate(shape.cache))
    lane = np.arange(CAPACITY).reshape(1, -1, 1, LANES)
    keys = np.where(lane < position, keys, np.float32(np.nan))
    values[:, position:] = np.nan
    return {"k_cache": keys.astype(shape.kv_dtype), "v_cache": values.astype(shape.kv_dtype)}


def integer_cache(shape: AttentionShape, position: int) -> Arrays:
    """As ``cache``; positions from ``position`` on have scales that are not numbers."""
    rng, filled = np.random.default_rng(2), {}
    for tensor in shape.cache:
        if tensor.dtype == "int8":
            filled[tensor.name] = rng.integers(-127, 128, tensor.shape, dtype=np.int8)
        elif tensor.dtype == "uint8":
            pairs = rng.integers(1, 16, (2, *tensor.shape), dtype=np.uint8)
            filled[tensor.name] = pairs[0] | pairs[1] << 4
        else:
            filled[tensor.name] = rng.uniform(0.001, 0.03, tensor.shape).astype(np.float32)
            by_group = shape.kv_dtype == "int4" and tensor.name == "k_scale"
            filled[tensor.name][(slice(None),) * (1 + by_group) + (slice(position, None),)] = np.nan
    return filled


def step(shape: AttentionShape, given: Arrays, kept: Arrays, position: int, target: Target,
         cuts: tuple[int, ...] = ()) -> Arrays:  # fmt: skip
    """q, o and the cache after the append and the attend kernel on the projections ``given``."""
    of_model = parameters(shape)
    shared = {
        t.name: of_model.pop(t.name)
        for t in (*shape.bias, *shape.sinks, *shape.limits, *shape.constants)
    }
    inputs = {**given, **of_model, **kept}
    appended = run(attention.build_append(shape), inputs, target, position=position, cuts=cuts)
    inputs = {name: appended[name] for name in ("q", *(t.name for t in shape.cache))}
    kernel = attention.build_attend(shape)
    attended = run(kernel, {**inputs, **shared}, target, position=position, cuts=cuts)
    return {**inputs, "o": attended["o"]}


def _check_nibbles(got: np.ndarray, want: np.ndarray) -> None:
    for shift in (0, 4):
        ours, theirs = ((x >> shift & 15).astype(int) for x in (got, want))
        assert np.abs(ours - theirs).max() <= 1
        assert (ours != theirs).mean() < 1e-3


def check_step(shape: AttentionShape, position: int, target: Target) -> None:
    """The append and the attend kernel compute what the reference says."""
    given, kept = projections(shape), cache(shape, position)
    got = step(shape, given, kept, position, target, cuts=(1, 2))
    want = ref.append(shape, {**given, **parameters(shape), **kept}, position)
    for name, value in want.items():
        if value.dtype == np.uint8:
            _check_nibbles(got[name], value)
            continue
        # A sum's own error may carry it over the boundary between two float16, or two levels.
        relative = np.finfo(np.float16).eps if value.dtype == np.float16 else 1e-7
        absolute = 1 if value.dtype == np.int8 else ABSOLUTE
        np.testing.assert_allclose(
            got[name].astype(np.float32), value.astype(np.float32),
            rtol=relative, atol=absolute, err_msg=name,
        )  # fmt: skip
        if value.dtype == np.int8:
            assert (got[name] != value).mean() < 1e-3, name
    expected = ref.attend(shape, {**parameters(shape), **got}, position)
    np.testing.assert_allclose(got["o"], expected, atol=ABSOLUTE)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")
