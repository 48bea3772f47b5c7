"""Masks as lists of blocks: kernels compute them, and read nothing of blocks that nobody sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.schedules import attention
from slmtvm.schedules import isa as isas
from slmtvm.schedules.attention import AttentionShape, block_tables
from slmtvm.schedules.vector import LANES
from slmtvm.target import Target
from tests.machines import runnable_targets
from tests.schedules.attention_cases import (
    ABSOLUTE,
    CAPACITY,
    Arrays,
    attention_shape,
    bits,
    cache,
    parameters,
    projections,
)
from tests.schedules.harness import run

HOST = Target.load("x86-64-v3")
N = 120  # positions that the mask is for
PLACES = np.arange(N)
BEHIND = PLACES[:, None] - PLACES
GLOBAL = (np.abs(BEHIND) <= 9) | (PLACES < 2) | (PLACES[:, None] < 2)
DIAGONAL = PLACES[:, None] // 48 == PLACES // 48
BROKEN = DIAGONAL & ~((PLACES[:, None] == 70) & (PLACES == 66))
STRIDED = np.tri(N, dtype=bool) & ((BEHIND < 5) | (PLACES % 40 == 7))


def of_heads(heads: int) -> np.ndarray:
    """A band of its own and another token that is seen by all, for each head."""
    own = [(np.abs(BEHIND) <= 3 + 5 * h) | (31 * h == PLACES) for h in range(heads)]
    return np.stack(own)


def softmax_over(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("valid", [N, 61, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "accumulators", "visible"),
    [
        pytest.param(4, 4, 4, GLOBAL[None], marks=pytest.mark.slow),
        pytest.param(4, 2, 16, of_heads(4), marks=pytest.mark.slow),
        (6, 2, 16, np.repeat(of_heads(2), 3, axis=0)),
        pytest.param(4, 2, 4, BROKEN[None], marks=pytest.mark.slow),
    ],
    ids=["of_all", "of_each_head", "of_groups", "broken_in_one_place"],
)
def test_an_encoder_s_rows_see_what_the_mask_shows(
    heads: int, kv_heads: int, accumulators: int, visible: np.ndarray, valid: int
) -> None:
    d = 40
    mask, lists = block_tables(visible, kv_heads, CAPACITY, rows=LANES)
    assert mask.masks * mask.members in (1, kv_heads, heads)
    shape = replace(
        attention_shape(
            N,
            heads,
            kv_heads,
            d,
            mask="bidirectional",
            accumulators=accumulators,
            queries=min(accumulators, 8),
        ),
        blocks=mask,
    )
    made = run(attention.build_append(shape), projections(shape), HOST)
    inputs = {name: made[name] for name in ("q", "k_cache", "v_cache")}
    place = np.arange(CAPACITY).reshape(1, -1, 1, LANES)
    inputs["k_cache"] = np.where(place < valid, inputs["k_cache"], np.float32(np.nan))
    inputs["v_cache"] = made["v_cache"].copy()
    inputs["v_cache"][:, valid:] = np.nan
    kernel = attention.build_attend(shape)
    got = run(kernel, {**inputs, **lists}, HOST, valid=valid, cuts=(3,))["o"]
    keys = made["k_cache"].transpose(0, 1, 3, 2).reshape(kv_heads, CAPACITY, d)[:, :valid]
    queries = made["q"].reshape(N, heads, d)[:valid]
    for head in range(heads):
        kv, seen = head // (heads // kv_heads), visible[head if len(visible) > 1 else 0]
        scores = queries[:, head].astype(float) @ keys[kv].T * d**-0.5
        want = softmax_over(scores, seen[:valid, :valid]) @ made["v_cache"][kv, :valid]
        ours = got.reshape(N, heads, d)[:valid, head]
        np.testing.assert_allclose(ours, want, atol=ABSOLUTE)


@pytest.mark.slow
def test_a_key_hidden_in_one_place_changes_its_row_alone() -> None:
    """And rows that are prefetched have the bits of others."""
    shape = attention_shape(N, 4, 2, 40, mask="bidirectional", queries=6)
    made = run(attention.build_append(shape), projections(shape), HOST)
    inputs = {name: made[name] for name in ("q", "k_cache", "v_cache")}
    results = []
    for visible, ahead in ((DIAGONAL, False), (BROKEN, True)):
        mask, lists = block_tables(visible[None], 2, CAPACITY, rows=LANES)
        kernel = attention.build_attend(replace(shape, blocks=mask, rows_ahead=ahead))
        results.append(bits(run(kernel, {**inputs, **lists}, HOST, valid=N)["o"]))
    whole, broken = results
    assert np.array_equal((whole != broken).any(axis=1), PLACES == 70)


def decoded(shape: AttentionShape, lists: Arrays, position: int, rows: int, at_once: int) -> Arrays:
    """``rows`` from ``position`` on, ``at_once`` in a step."""
    given = projections(replace(shape, m=rows))
    kept, outputs, at = cache(shape, position), [], 0
    while at < rows:
        step = replace(shape, m=min(at_once, rows - at))
        part = {name: array[at : at + step.m] for name, array in given.items()}
        inputs, here = {**part, **parameters(step), **kept}, position + at
        if step.m == 1:
            made = run(attention.build_decode(step), {**inputs, **lists}, HOST, position=here)
        else:
            made = run(attention.build_append(step), inputs, HOST, position=here)
            read = {name: made[name] for name in ("q", *(t.name for t in step.cache))}
            kernel = attention.build_attend(step)
            made |= run(kernel, {**read, **lists}, HOST, position=here, cuts=(1,))
        kept = {t.name: made[t.name] for t in step.cache}
        outputs.append(made["o"])
        at += step.m
    return {**kept, "o": np.concatenate(outputs)}


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "int4"])
def test_a_decoder_s_steps_have_the_bits_of_single_rows(kv_dtype: str) -> None:
    mask, lists = block_tables(STRIDED[None], 2, CAPACITY, rows=2 * LANES)
    shape = replace(attention_shape(1, 4, 2, 40, 20, kv_dtype=kv_dtype), blocks=mask)
    single = decoded(shape, lists, 83, 9, 1)
    assert np.isfinite(single["o"]).all()
    for at_once, accumulators in ((5, 4), (9, 16)):
        wide = replace(shape, accumulators=accumulators, queries=min(accumulators, 8))
        for name, value in decoded(wide, lists, 83, 9, at_once).items():
            np.testing.assert_array_equal(bits(value), bits(single[name]), err_msg=name)


@pytest.mark.slow
def test_a_decoder_s_row_reads_the_blocks_of_its_list_alone_on_every_target() -> None:
    position = 101
    mask, lists = block_tables(STRIDED[None], 2, CAPACITY, rows=2 * LANES)
    plain = replace(attention_shape(1, 4, 2, 40, softcap=3.0), blocks=mask)
    kept = cache(plain, position)
    # Of the blocks 0 to 6, those of the positions 7, 47 and 87 and of the last few.
    for block in (1, 3, 4):
        kept["k_cache"][:, block] = np.nan
        kept["v_cache"][:, block * LANES : (block + 1) * LANES] = np.nan
    inputs = {**projections(plain), **kept, **lists}
    results = []
    for target in runnable_targets():
        kernel = attention.build_decode(attention.suited(plain, isas.get(target.isa)))
        results.append(run(kernel, inputs, target, position=position)["o"])
    assert np.isfinite(results[0]).all()
    for result in results[1:]:
        np.testing.assert_array_equal(bits(result), bits(results[0]))


def test_lists_grow_with_what_is_seen_alone() -> None:
    places = np.arange(1024)
    near = np.abs(places[:, None] - places) <= 32
    counts = []
    for n in (256, 512, 1024):
        mask, tables = block_tables(near[None, :n, :n], 1, n, rows=LANES)
        assert mask.most == 5
        assert len(tables["block_places"]) == mask.entries
        counts.append(mask.entries)
    assert counts == [5 * n // LANES - 6 for n in (256, 512, 1024)]
