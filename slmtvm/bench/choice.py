"""Which of two libraries of a bundle answers sooner, by what was measured of both."""

from __future__ import annotations

from slmtvm.bench.report import BenchReport, Rate
from slmtvm.runtime.fastest import Fastest

_PROMPT = _ANSWER = 200  # tokens
_ENCODED = 128  # tokens of a text


def seconds(report: BenchReport) -> tuple[float, int]:
    """What a prompt and an answer, or of an encoder a text, would take at the rates measured; and
    with how many threads that is least."""
    times = {}
    for threads in {rate.threads for rate in report.rates}:
        rates = [rate for rate in report.rates if rate.threads == threads]
        many = [rate for rate in rates if rate.phase != "decode"]
        single = [rate for rate in rates if rate.phase == "decode"]
        if single:
            taken = _PROMPT / _nearest(many, _PROMPT) + _ANSWER / _nearest(single, _PROMPT)
        else:
            taken = _ENCODED / _nearest(many, _ENCODED)
        times[threads] = taken
    threads = min(times, key=lambda n: (times[n], n))
    return times[threads], threads


def _nearest(rates: list[Rate], tokens: int) -> float:
    """Tokens a second of what comes nearest to a prompt of ``tokens``, or to a place behind it."""
    return min(
        rates,
        key=lambda r: abs((r.position if r.phase == "decode" else r.tokens) - tokens),
    ).tokens_per_second


def faster_of(gpu: BenchReport, cpu: BenchReport) -> Fastest:
    """The faster one, the GPU where they are equal."""
    (of_gpu, _), (of_cpu, threads) = seconds(gpu), seconds(cpu)
    what = (
        f"a text of {_ENCODED} tokens"
        if gpu.kind == "encoder"
        else f"a prompt of {_PROMPT} tokens and an answer of {_ANSWER}"
    )
    taken = (
        f"{of_gpu * 1e3:,.1f} ms of {gpu.target} and {of_cpu * 1e3:,.1f} ms of {cpu.target} "
        f"with {threads} thread{'s' * (threads > 1)}, for {what}"
    )
    faster = gpu if of_gpu <= of_cpu else cpu
    return Fastest(faster.target, f"bench found {faster.target} faster here: {taken}")
