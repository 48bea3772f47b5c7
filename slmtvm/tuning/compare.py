"""Whole models compared on a device: two bundles in turns, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from slmtvm.bench.busy import Busy, Stamp, busy_between, stamp
from slmtvm.bench.phases import some_tokens
from slmtvm.bundle.write import write_bundle
from slmtvm.errors import DeviceError, RpcError
from slmtvm.plan.model import Plan
from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.planner import Planner
from slmtvm.rpc.client import Device
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.schedules.templates import KnobChoice, default_choice
from slmtvm.target import Target
from slmtvm.tuning.tasks import TaskKey, Workload, function_calls
from slmtvm.tuning.whole import Turns
from slmtvm.verify.on_device import DeviceSession

MOST_TURNS, LEAST_TURNS = 15, 7
"""Turns end early where all are faster, by chance less than one time in a hundred, and where half
are not: such a setting is not confirmed."""
_DECODED = 48  # tokens
_AGAIN = 500  # milliseconds of a turn, in which prompts are computed as often as they can be
_COMPARED = 37  # tokens whose outputs must be equal: more than two chunks of 16, and no multiple
_LOSSES = 3
"""Devices that may be lost in a row."""


class Devices(Protocol):
    """Where models are compared."""

    def device(self) -> AbstractContextManager[Device]:
        """A device for as long as the context; RpcError where it is lost."""


@dataclass(frozen=True)
class Phase:
    """A phase that is timed: ``step`` as slm-device takes it, and the functions that it calls."""

    name: str
    step: str
    functions: frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Side:
    """A bundle and the number of threads that it runs on, 0 for as many as pay."""

    bundle: Path
    threads: int = 1


@dataclass(frozen=True)
class Compared:
    """``turns`` by phase, or the reason why there are none; ``device`` as records have it; ``busy``
    with what else the machine was meanwhile."""

    turns: dict[str, Turns]
    device: dict[str, Any]
    failure: str | None = None
    busy: Busy = Busy(0.0, 0.0)  # noqa: RUF009


def phases(plan: Plan, workload: Workload) -> list[Phase]:
    """What is timed of a plan: a prompt and tokens in the middle of the answer to it; of an encoder
    a text of each length that it has functions for."""
    if plan.kind == "encoder":
        rows = sorted(f.rows for f in plan.functions if f.name == "body")
        return [Phase(f"encode {r}", _step(r, len(rows)), frozenset({("body", r)})) for r in rows]
    count = min(_DECODED, max(workload.generate, 1), max(plan.context // 2, 1))
    prompt = max(1, min(workload.prompt, plan.context - count))
    position = min(workload.prompt + workload.generate // 2, plan.context - count)
    least = min(f.rows for f in plan.functions if f.name == "body")
    called = function_calls(plan, Workload(prompt, 0))
    many = frozenset(
        at for at, calls in called.items() if calls and at[0] == "body" and at[1] > least
    )
    return [
        Phase("prefill", _step(prompt, 1), many),
        Phase("decode", f"decode:{position}:{count}", frozenset({("body", least), ("head", 1)})),
    ]


def _step(tokens: int, lengths: int) -> str:
    """For slm-device: a prompt of so many tokens, one of so many that share a turn."""
    return f"prefill:{tokens}:1:{_AGAIN // lengths}"


def prompts(plan: Plan, workload: Workload) -> list[Phase]:
    """Prompts of several lengths: chunks that suit one length may not suit the next."""
    most = min(2 * workload.prompt, plan.context)
    lengths = sorted({max(1, most // part) for part in (12, 4, 2, 1)})
    return [Phase(f"prefill {n}", _step(n, len(lengths)), frozenset()) for n in lengths]


def tasks_of(plan: Plan, phase: Phase) -> set[TaskKey]:
    """The kernels with knobs that a phase calls."""
    names = {
        step.kernel
        for function in plan.functions
        if (function.name, function.rows) in phase.functions
        for step in function.steps
    }
    found = (plan.kernels[name].tunable for name in names)
    return {TaskKey(t.kind, t.shape) for t in found if t is not None}


class Comparer:
    """Builds bundles of one model in ``folder``, and compares them."""

    def __init__(
        self,
        planner: Planner,
        target: Target,
        devices: Devices,
        folder: Path,
        progress: Callable[[str], None] = lambda _: None,
        turns: int = MOST_TURNS,
    ) -> None:
        """turns: at most."""
        self.planner, self.target = planner, target
        self.devices, self._folder, self._progress = devices, folder, progress
        self._turns = turns
        self._made = 0

    def build(self, choose: KnobChoice = default_choice, setup: Setup = DEFAULT_SETUP) -> Path:
        """A bundle without batches, which are not timed."""
        self._progress(f"kernels for {self.target.name}")
        plan = without_batches(self.planner.plan(self.target, choose, setup))
        self._made += 1
        path = self._folder / f"{self._made}.slm"
        write_bundle(path, [(self.target, plan)], progress=self._progress)
        return path

    def compare(self, default: Side, other: Side, timed: Sequence[Phase], what: str) -> Compared:
        """Seconds of ``timed`` phases, turn by turn, the order of the two swapped each time.

        Nothing is timed where the outputs are not equal bytes. ``what``: of which progress is said.
        Raises RpcError where devices are lost again and again, DeviceError where the default fails.
        """
        for last in (*[False] * (_LOSSES - 1), True):
            try:
                with self.devices.device() as device:
                    return self._compare(device, default, other, timed, what)
            except RpcError:
                if last:
                    raise
        raise AssertionError("the last loss is raised")

    def _compare(
        self, device: Device, default: Side, other: Side, timed: Sequence[Phase], what: str
    ) -> Compared:  # fmt: skip
        info = device.info()
        facts = {"cpu": info.get("model") or device.key, "key": device.key}
        facts |= {name: info[name] for name in ("server", "exec") if info.get(name)}
        one = self._there(device, default.bundle)
        expected = _outputs(one)
        try:
            two = self._there(device, other.bundle)
            if not np.array_equal(_outputs(two).view(np.uint32), expected.view(np.uint32)):
                return Compared({}, facts, "computes other bits than the default")
        except DeviceError as error:
            return Compared({}, facts, str(error))
        sides = ((one, default.threads), (two, other.threads))
        seconds: tuple[list[dict[str, float]], ...] = ([], [])
        spans: list[tuple[Stamp, Stamp]] = []
        while True:
            turn = len(seconds[0])
            self._progress(f"{what}: turn {turn + 1} of {self._turns}")
            for which in (0, 1) if turn % 2 else (1, 0):
                found, span = _timed(*sides[which], timed)
                seconds[which].append(found)
                spans.append(span)
            turns = _turns(seconds, timed)
            if turn + 1 >= self._turns or all(_clear(t) for t in turns.values()):
                return Compared(turns, facts, busy=busy_between(spans))

    def _there(self, device: Device, bundle: Path) -> DeviceBundle:
        programs = bundle.with_suffix(".programs")
        return DeviceBundle(device, bundle, programs=programs, progress=self._progress)


def without_batches(plan: Plan) -> Plan:
    """``plan`` without what sessions are computed together with."""
    functions = tuple(f for f in plan.functions if not f.name.startswith("batch"))
    called = {step.kernel for f in functions for step in f.steps}
    kernels = {name: code for name, code in plan.kernels.items() if name in called}
    return replace(plan, functions=functions, kernels=kernels)


def _outputs(there: DeviceBundle) -> np.ndarray:
    """What a bundle computes of some tokens."""
    session, info = DeviceSession(there), there.info
    count = min(_COMPARED, int(info["context"]))
    if info["kind"] == "encoder":
        return session.encode(some_tokens(count, info))
    if info["kind"] == "encoder-decoder":
        session.encode(some_tokens(min(_COMPARED, int(info["source_context"])), info))
    return session.eval_all(some_tokens(count, info))


def _timed(
    there: DeviceBundle, threads: int, timed: Sequence[Phase]
) -> tuple[dict[str, float], tuple[Stamp, Stamp]]:
    """Seconds of a call or a token of each phase, in a process of its own; the machine before and
    after."""
    sourced = there.info["kind"] == "encoder-decoder"
    source = str(there.info["source_context"] if sourced else 0)
    # Of one thread the time that it runs: what else the machine does counts for nothing.
    clock = "2" if threads == 1 else "0"
    entries = there.objects("bench", str(threads), clock, source, *(p.step for p in timed))
    found = [entry["times"] for entry in entries if "step" in entry]
    if len(found) != len(timed):
        raise DeviceError("measured something else than was asked for", where=there.where)
    # A stray interruption of one token is no fault of the code's.
    seconds = {p.name: median(t) for p, t in zip(timed, found, strict=True)}
    stamps = [
        stamp(now, stat, own, entry["ticks"])
        for entry in entries
        if "busy" in entry
        for now, stat, own in [entry["busy"]]
    ]
    return seconds, (stamps[0], stamps[-1])


def _turns(
    seconds: Sequence[Sequence[dict[str, float]]], timed: Sequence[Phase]
) -> dict[str, Turns]:  # fmt: skip
    default, other = seconds
    return {
        p.name: Turns(p.name, tuple(s[p.name] for s in other), tuple(s[p.name] for s in default))
        for p in timed
    }


def _clear(turns: Turns) -> bool:
    """Whether more turns would hardly change the verdict."""
    return len(turns.ratios) >= LEAST_TURNS and (max(turns.ratios) < 1 or turns.ratio >= 1)


def in_rounds(parts: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """The first of each part, then the second of each that has one, ..."""
    for at in range(max(map(len, parts), default=0)):
        yield [part[at] for part in parts if at < len(part)]
