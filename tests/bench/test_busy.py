"""What else a machine does is seen, and said beside what was measured on it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from slmtvm.bench import BenchReport
from slmtvm.bench.busy import Busy, busy_between, stamp, watch_for


def test_a_process_that_computes_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert watch_for(1.0).others > 0.1
        finally:
            process.kill()


def test_what_this_process_computes_itself_does_not_count() -> None:
    # user nice system idle iowait irq softirq steal, in hundredths of a second
    before = stamp(10.0, "cpu  9000 500 400 70000 30 60 40 500 0 0", own=40.0, ticks=100)
    after = stamp(12.0, "cpu  9200 550 440 70100 30 65 45 600 0 0", own=42.5, ticks=100)
    assert busy_between([(before, after)]) == Busy(others=0.25, stolen=0.5)
    apart = (replace(before, seconds=20.0), replace(after, seconds=24.0))
    assert busy_between([(before, after), apart]).others == pytest.approx(1 / 6)


def test_where_the_system_does_not_say_nothing_is_seen() -> None:
    spans = [(stamp(1.0, "", 1.0, 100), stamp(2.0, "cpu x", 2.0, 100))]
    assert str(busy_between(spans)) == "idle"


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


@pytest.mark.slow
def test_a_report_says_that_its_rates_are_too_low_where_the_machine_was_busy(
    report: BenchReport,
) -> None:
    assert "lower than this machine allows" in str(replace(report, busy_during=Busy(1.0, 0.0)))
    assert "lower than this machine allows" not in str(replace(report, busy_during=Busy(0.0, 0.0)))
