"""What else a machine does is seen, and said beside what was measured on it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from slmtvm.bench import BenchReport, busy
from slmtvm.bench.busy import Busy, Watch, watch_for


def test_a_process_that_computes_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert watch_for(1.0).others > 0.1
        finally:
            process.kill()


def test_what_this_process_computes_itself_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(100.0, 5.0, 40.0), (103.0, 6.0, 42.5)])
    monkeypatch.setattr(busy, "_times", lambda: next(times))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(busy.time, "perf_counter", lambda: next(clock))
    assert Watch().read() == Busy(others=0.25, stolen=0.5)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Busy(0.02, 0.0), "idle"),
        (Busy(1.0, 0.0), "1.0 cores by other processes"),
        (Busy(0.0, 0.4), "0.4 by other guests of this machine"),
        (Busy(1.0, 0.4), "1.0 cores by other processes and 0.4 by other guests of this machine"),
    ],
)
def test_what_others_take_is_said_in_words(found: Busy, text: str) -> None:
    assert str(found) == text
    assert found.matters == (text != "idle")


def test_a_report_says_that_its_rates_are_too_low_where_the_machine_was_busy(
    report: BenchReport,
) -> None:
    assert "lower than this machine allows" in str(replace(report, busy_during=Busy(1.0, 0.0)))
    assert "lower than this machine allows" not in str(replace(report, busy_during=Busy(0.0, 0.0)))
