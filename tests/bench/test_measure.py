"""What a bench of a small bundle reports: its form, and whatever does not depend on time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmtvm.bench import BenchReport, bench
from slmtvm.errors import BundleError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from tests.passes import toy


def test_every_phase_is_measured_for_every_number_of_threads(report: BenchReport) -> None:
    for threads in (1, 2):
        rates = [r for r in report.rates if r.threads == threads]
        assert {r.tokens for r in rates if r.phase == "prefill"} == {16}  # 128 are too many here
        positions = [r.position for r in rates if r.phase == "decode"]
        assert positions[0] == 0
        assert positions[-1] + toy.CONTEXT // 2 == toy.CONTEXT
        assert all(r.tokens_per_second > 0 and 0 < r.p50_ms <= r.p99_ms for r in rates)
    assert [limit.threads for limit in report.limits] == [1, 2]


def test_a_profile_accounts_for_all_time_in_kernels(report: BenchReport) -> None:
    phases = {(k.phase, k.threads) for k in report.kernels}
    assert len(phases) == 4  # prefill and decode, with one thread and two
    for phase in phases:
        kernels = [k for k in report.kernels if (k.phase, k.threads) == phase]
        assert sum(k.share for k in kernels) == pytest.approx(1)
        assert any(k.kernel.startswith("linear_int4") for k in kernels)
        assert all(0 <= k.overhead_seconds < k.seconds for k in kernels)


def test_the_read_limit_counts_the_weights_and_the_cache_of_a_token(report: BenchReport) -> None:
    target = Target.load(report.target)
    plan = build_plan(lower(fuse(toy.decoder()), target), {})
    steps = [s for f in plan.functions if f.rows == 1 for s in f.steps]
    weights = sum(plan.kernels[s.kernel].work.weight_bytes for s in steps)
    bandwidth = report.limits[0].read_bytes_per_second
    for rate in (r for r in report.rates if r.phase == "decode" and r.threads == 1):
        attended = rate.position + (rate.tokens + 1) / 2
        read = weights + plan.kv_bytes_per_token * attended
        assert rate.read_limit == pytest.approx(bandwidth / read)


def test_the_compute_limit_counts_every_multiply_add_of_a_token(report: BenchReport) -> None:
    heads = toy.HEAD_DIM * toy.HEADS
    matrices = 2 * toy.DIM * (heads + toy.HEAD_DIM * toy.KV_HEADS) + 3 * toy.DIM * toy.FFN
    peak = report.limits[0].multiply_adds_per_second
    for rate in (r for r in report.rates if r.phase == "decode" and r.threads == 1):
        attended = rate.position + (rate.tokens + 1) / 2
        token = 2 * (matrices + 2 * heads * attended) + toy.DIM * toy.VOCAB  # two layers, the head
        assert rate.compute_limit == pytest.approx(peak / token)


def test_the_report_is_plain_json(report: BenchReport) -> None:
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(read["rates"]) == len(report.rates)
    assert read["kernels"][0]["of_limit"] == report.kernels[0].of_limit
    assert read["resident_bytes"] == report.resident_bytes


def test_the_text_has_a_line_for_every_number(report: BenchReport) -> None:
    lines = str(report).splitlines()
    for rate in report.rates:
        assert any(
            line.startswith(rate.name) and f" {rate.tokens_per_second:,.0f} " in line
            for line in lines
        )
    assert sum(line.endswith(report.kernels[0].kernel) for line in lines) == 2


def test_an_encoder_is_measured_by_whole_texts(encoder: Path) -> None:
    report = bench(encoder, threads=[1], kernels=False)
    assert report.kernels == ()
    assert {r.phase for r in report.rates} == {"encode"}
    assert all(r.limit is None for r in report.rates)  # its kernels do not say what they read
    json.dumps(report.to_json(), allow_nan=False)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"missing\.slm"):
        bench(tmp_path / "missing.slm")
