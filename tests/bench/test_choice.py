"""The faster of two libraries is that which answers sooner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slmtvm.bench import BenchReport
from slmtvm.bench.choice import faster_of, seconds
from slmtvm.bench.report import Rate


def rate(phase: str, threads: int, position: int, tokens: int, per_second: float) -> Rate:
    return Rate(phase, threads, position, tokens, per_second, 1.0, 1.0, None, None)


GPU = (rate("prefill", 1, 0, 16, 1.0), rate("prefill", 1, 0, 128, 4000.0),
       rate("decode", 1, 0, 100, 1.0), rate("decode", 1, 256, 100, 200.0))  # fmt: skip
SLOW, FAST = (
    tuple(replace(r, threads=t, tokens_per_second=r.tokens_per_second * by) for r in GPU)
    for t, by in ((1, 0.5), (4, 1.25))
)


@pytest.mark.slow
def test_a_prompt_and_an_answer_count_at_the_best_number_of_threads(report: BenchReport) -> None:
    gpu = replace(report, target="gpu", rates=GPU)
    assert seconds(gpu) == (pytest.approx(200 / 4000 + 200 / 200), 1)
    cpu = replace(report, target="cpu", rates=SLOW + FAST)
    assert seconds(cpu) == (pytest.approx(seconds(gpu)[0] / 1.25), 4)
    found = faster_of(gpu, cpu)
    assert found.library == "cpu"
    assert found.why == (
        "bench found cpu faster here: 1,050.0 ms of gpu and 840.0 ms of cpu with 4 threads, for a "
        "prompt of 200 tokens and an answer of 200"
    )
    assert faster_of(gpu, replace(cpu, rates=SLOW)).library == "gpu"
    assert faster_of(gpu, replace(cpu, rates=GPU)).library == "gpu"  # as fast


def test_of_an_encoder_a_text_counts(report: BenchReport) -> None:
    gpu = replace(report, target="gpu", kind="encoder", rates=(rate("encode", 1, 0, 128, 64.0),))
    assert seconds(gpu) == (2.0, 1)
    assert faster_of(gpu, gpu).why.endswith("with 1 thread, for a text of 128 tokens")
