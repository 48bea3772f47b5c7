"""Tuning goes on when devices and the tracker die, and where it was ended when it dies itself."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slmtvm.target import Target
from slmtvm.tuning.records import read_records
from slmtvm.tuning.tasks import setting_of
from tests.rpc.processes import ROOT, Process, Runner, Tracker, running, wait_until_registered
from tests.schedules.harness import emulators

TARGET = "cortex-a78"
_SECONDS = 120.0
# A tuner by itself, of a small decoder's kernels: tracker, file, trials.
_TUNER = f"""
import sys
from slmtvm.without_torch import import_no_torch
import_no_torch()
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.records import RecordFile, read_records
from slmtvm.tuning.tasks import Workload
from slmtvm.tuning.tuner import Budget, tune_plan
from tests.passes import toy
tracker, path, trials = sys.argv[1], RecordFile(sys.argv[2]), int(sys.argv[3])
target = Target.load({TARGET!r})
plan = build_plan(lower(fuse(toy.decoder("int4")), target), {{}})
path.append([])
with DeviceMeasurer(target, tracker, {TARGET!r}, wait_s=60, progress=print) as measurer:
    tune_plan(plan, target, measurer, path, known=read_records(path.path),
              budget=Budget(trials), workload=Workload(0, 100))
print("ended", flush=True)
"""


def _tuner(tracker: str, file: Path, trials: int) -> Process:
    command = [sys.executable, "-c", _TUNER, tracker, str(file), str(trials)]
    return Process(["env", f"PYTHONPATH={ROOT}", *command])


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _wait(ready: Callable[[], bool], tuner: Process) -> None:
    deadline = time.monotonic() + _SECONDS
    while not ready():
        assert tuner.alive and time.monotonic() < deadline, tuner.lines
        time.sleep(0.05)


@pytest.mark.slow
def test_tuning_outlives_devices_and_the_tracker_and_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    emulator = " ".join(emulators(Target.load(TARGET))[0])

    def board(tracker: Tracker) -> Runner:
        options = ("--key", TARGET, "--exec", emulator, "--memory", "2G")
        return Runner("--tracker", tracker.address, *options)

    first = Tracker()
    boards = [board(first), board(first)]
    wait_until_registered(first, TARGET, 2)
    tuner = _tuner(first.address, file, 1000)
    with running(first, *boards, tuner):
        _wait(lambda: _lines(file) > 0, tuner)
        first.end(signal.SIGKILL)
        boards[0].end(signal.SIGKILL)
        before = _lines(file)
        _wait(lambda: _lines(file) > before + 8, tuner)  # with the other one, and no tracker
        boards[1].end(signal.SIGKILL)
        second = Tracker(first.port)
        third = board(second)
        with running(second, third):
            before = _lines(file)
            _wait(lambda: _lines(file) > before + 8, tuner)
            tuner.end(signal.SIGKILL)
            kept = read_records(file)
            resumed = _tuner(second.address, file, 8)
            with running(resumed):
                resumed.wait_for("^ended")
    records = read_records(file)
    assert records[: len(kept)] == kept and len(records) > len(kept) >= 17
    assert not any(record.failure for record in records)
    known = {(r.key.text, setting_of(r.knobs)) for r in kept}
    searched = [r for r in records[len(kept) :] if len(r.seconds) < 10]
    assert len(searched) == 8
    assert not known & {(r.key.text, setting_of(r.knobs)) for r in searched}
