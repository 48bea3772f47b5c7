"""Measuring a batch of settings: one program that runs somewhere, whatever some of them do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from slmtvm.errors import DeviceError
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.gpu_program import build_gpu_program
from slmtvm.tuning.program import Situation, build_program
from slmtvm.tuning.tasks import TaskKey

_STARTING_SECONDS = 30.0  # for a program to be there, filled buffers included


@dataclass(frozen=True)
class Batch:
    """Settings of one task to be measured in turns with its default.

    ``working_set``: bytes of weights that calls go through before one comes again.
    ``milliseconds`` of each setting in each of the ``rounds``; ``limit`` seconds for one of these.
    """

    key: TaskKey
    settings: Sequence[Knobs]
    situation: Situation = field(default_factory=Situation)
    working_set: int = 0
    threads: int = 1
    rounds: int = 7
    milliseconds: float = 3.0
    limit: float = 20.0


@dataclass(frozen=True)
class Measurement:
    """Seconds of a call in each round, and of the default's in the same; or why there are none.

    ``device``: what is known of where it was measured.
    """

    knobs: Knobs
    seconds: tuple[float, ...] = ()
    default_seconds: tuple[float, ...] = ()
    failure: str | None = None
    device: Mapping[str, Any] = field(default_factory=dict)


class Measurer(Protocol):
    """Measures on some device."""

    def measure(self, batch: Batch) -> list[Measurement]:
        """A measurement for each setting of the batch, in order.

        Raises DeviceError where the device is gone, or fails with the default itself.
        """


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit status, negative for a signal, None where its time was up."""

    status: int | None
    stdout: str
    stderr: str


RunProgram = Callable[[bytes, Sequence[str], float], Ran]
"""Runs an executable with these arguments for so many seconds at most."""


class ProgramMeasurer:
    """Builds a program for each batch, and has it run by ``run`` on ``device``."""

    def __init__(
        self,
        target: Target,
        run: RunProgram,
        device: Mapping[str, Any] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._target, self._run, self._progress = target, run, progress
        self._device = device or {}

    def measure(self, batch: Batch) -> list[Measurement]:
        program = BatchProgram(batch, self._target, self._progress)
        return program.run(self._run, self._device)


class BatchProgram:
    """The program that measures a batch, built when this is made."""

    def __init__(
        self, batch: Batch, target: Target, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        template, isa = TEMPLATES[batch.key.kind], isas.get(target.isa)
        self._batch = batch
        self._settings = [template.default_knobs(batch.key.shape, isa), *batch.settings]
        kernels = [template.build(batch.key.shape, isa, knobs) for knobs in self._settings]
        build = build_program if target.cuda is None else build_gpu_program
        self._program = build(kernels, target, batch.situation, progress)

    def run(self, run: RunProgram, device: Mapping[str, Any]) -> list[Measurement]:
        """Have ``run`` run it, again without each setting that fails; as ``Measurer.measure``."""
        batch, failures = self._batch, dict[int, str]()
        while True:
            ran = run(self._program, _arguments(batch, failures), _seconds(batch))
            report = _Report(ran.stdout)
            if ran.status == 0:
                break
            if report.begun in failures or report.begun is None:
                raise DeviceError(_ending(ran), where=f"measuring {batch.key.label}")
            failures[report.begun] = _ending(ran)
            if report.begun == 0:
                raise DeviceError(
                    f"the default kernel {failures[0]}", where=f"measuring {batch.key.label}"
                )
        failures |= dict.fromkeys(report.wrong, "computes other bytes than the default")
        default = report.seconds[0]
        return [
            _measurement(knobs, report.seconds.get(i), default, failures.get(i), device)
            for i, knobs in enumerate(self._settings)
        ][1:]


def _seconds(batch: Batch) -> float:
    """The longest that a program may take that reports what hangs itself."""
    each = 0.1 + 10 * batch.milliseconds / 1e3
    return _STARTING_SECONDS + batch.limit + (len(batch.settings) + 1) * batch.rounds * each


class _Report:
    """What the program printed, as far as it came."""

    def __init__(self, stdout: str) -> None:
        self.begun: int | None = None
        self.wrong: list[int] = []
        self.seconds: dict[int, tuple[float, ...]] = {}
        for line in stdout.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off in the middle
            if "begin" in entry:
                self.begun = int(entry["begin"])
            elif "checked" in entry and not entry["equal"]:
                self.wrong.append(int(entry["checked"]))
            elif "seconds" in entry:
                self.seconds[int(entry["index"])] = tuple(map(float, entry["seconds"]))


def program_seconds(stdout: str) -> dict[int, tuple[float, ...]]:
    """Of what a program printed, by the number of a kernel the seconds of a call in each round."""
    return _Report(stdout).seconds


def _arguments(batch: Batch, failures: dict[int, str]) -> list[str]:
    skip = ["--skip", ",".join(map(str, failures))] if failures else []
    return [
        "--rounds", str(batch.rounds), "--millis", str(batch.milliseconds),
        "--working-set", str(batch.working_set), "--threads", str(batch.threads),
        "--limit", str(int(batch.limit)), *skip,
    ]  # fmt: skip


_ALARM = -14  # SIGALRM: the program's own limit


def _ending(ran: Ran) -> str:
    if ran.status is None or ran.status == _ALARM:
        return "does not come back"
    if ran.status < 0:
        return f"ends with signal {-ran.status}"
    return f"ends with status {ran.status}: {ran.stderr.strip()[:200] or 'it says nothing'}"


def _measurement(
    knobs: Knobs,
    seconds: tuple[float, ...] | None,
    default: tuple[float, ...],
    failure: str | None,
    device: Mapping[str, Any],
) -> Measurement:
    if failure is not None or not seconds:
        return Measurement(knobs, failure=failure or "was not measured", device=device)
    return Measurement(knobs, seconds, default[: len(seconds)], device=device)
