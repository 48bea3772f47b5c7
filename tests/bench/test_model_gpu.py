"""The model of a GPU counts what a token reads and launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_gpu import Token, main, token_of

from slmtvm.plan.model import KernelWork
from tests.models import model_path
from tests.runtime.toy import toy_decoder


def test_a_token_reads_the_weights_and_what_it_sees_once() -> None:
    plan = toy_decoder()
    body, head = (
        next(f for f in plan.functions if (f.name, f.rows) == (name, 1))
        for name in ("body", "head")
    )
    kernels = {name: replace(code, work=KernelWork()) for name, code in plan.kernels.items()}
    first, last = body.steps[0].kernel, head.steps[-1].kernel
    kernels[first] = replace(kernels[first], work=KernelWork(weight_bytes=100, context_bytes=3))
    kernels[last] = replace(kernels[last], work=KernelWork(context_bytes=7, window=5))
    times = sum(step.kernel == first for step in (*body.steps, *head.steps))
    token = token_of(replace(plan, kernels=kernels), 20)
    assert token.bytes == times * (100 + 3 * 20) + 7 * 5
    # Nothing of the toy's joins; two launches find what is likeliest.
    assert token.nodes == len(body.steps) + len(head.steps) + 2
    assert Token(10**6, 100).per_second(1.0, 100 * 1e-5) == pytest.approx(1 / (1e-3 + 1e-3))


@pytest.mark.slow
def test_the_table_says_that_it_is_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model_path("int4")), "--position", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "modelled, not measured" in lines[0]
    # Five for each of six layers, the embedding, the head, and two that find what is likeliest.
    assert lines[0].startswith("34 kernels")
    rates = [[float(n.replace(",", "")) for n in line.split("|")[3:6]] for line in lines[3:]]
    assert all(alone > one > many for alone, many, one in rates)
