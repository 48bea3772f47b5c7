"""What the kernels of a small decoder are said to read and compute."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from slmtvm.bench.work import kernel_work
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from tests.passes import toy
from tests.passes.toy import DIM, FFN, HEAD_DIM, HEADS, KV_HEADS, VOCAB, Layer, decoder

LAYERS = 2


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(lower(fuse(decoder(layers=LAYERS)), Target.load("x86-64-v3"), "float16"), {})


def total(plan: Plan, name: str, rows: int, field: str) -> int:
    """The sum of a field of KernelWork over the steps of a function."""
    (function,) = [f for f in plan.functions if (f.name, f.rows) == (name, rows)]
    return sum(getattr(plan.kernels[s.kernel].work, field) for s in function.steps)


@pytest.mark.parametrize("rows", [1, 16])
def test_multiply_adds_of_a_body_are_those_of_its_matrices(plan: Plan, rows: int) -> None:
    attention = DIM * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    matrices = attention + 3 * DIM * FFN
    assert total(plan, "body", rows, "multiply_adds") == rows * LAYERS * matrices


def test_a_head_multiplies_by_the_whole_vocabulary(plan: Plan) -> None:
    assert total(plan, "head", 1, "multiply_adds") == DIM * VOCAB


@pytest.mark.parametrize("rows", [1, 16])
def test_the_cache_is_read_once_by_attention(plan: Plan, rows: int) -> None:
    assert total(plan, "body", rows, "context_bytes") == plan.kv_bytes_per_token
    per_position = 2 * rows * HEADS * HEAD_DIM * LAYERS
    assert total(plan, "body", rows, "context_multiply_adds") == per_position


def test_a_divided_head_counts_its_cache_and_its_sums_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "KV_HEADS", 1)
    monkeypatch.setattr(toy, "HEAD_DIM", 32)
    made = build_plan(lower(fuse(toy.decoder("f32")), Target.load("x86-64-v3"), "int8"), {})
    assert any("scores" in name for name in made.kernels)
    assert total(made, "body", 1, "context_bytes") == made.kv_bytes_per_token
    assert total(made, "body", 1, "context_multiply_adds") == 2 * HEADS * 32 * LAYERS


def test_a_window_bounds_the_positions_that_are_counted() -> None:
    model = decoder("f32", variants=[Layer(window=24), Layer()])
    kernels = build_plan(lower(fuse(model), Target.load("x86-64-v3")), {}).kernels
    decode = [asdict(k.work) for name, k in kernels.items() if "decode" in name]
    counted = {
        attended: sorted(kernel_work(d, 1, attended).multiply_adds for d in decode)
        for attended in (10.0, 50.0)
    }
    assert counted[10.0][0] == counted[10.0][1] > 0
    assert counted[50.0] == [counted[10.0][0] * 2.4, counted[10.0][0] * 5]


def test_a_decoded_token_reads_every_matrix_once(plan: Plan) -> None:
    read = total(plan, "body", 1, "weight_bytes") + total(plan, "head", 1, "weight_bytes")
    looked_up = ("embedding", "cos", "sin")  # of these one row is read, not the whole
    whole = sum(
        s.data.nbytes for s in plan.segments if not any(part in s.name for part in looked_up)
    )
    assert whole <= read < 1.02 * whole
