"""A device that a bundle is measured on: all that a bench asks, answered by programs sent there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from slmtvm.bench import phases, probes
from slmtvm.bench.busy import Busy, Stamp, busy_between, stamp
from slmtvm.bench.limits import DOT_BLOCKS, Limits
from slmtvm.bench.machine import FIRST_PROMPT, Opened
from slmtvm.bench.phases import PhasePlan, Profile, Timed, attended
from slmtvm.bench.work import total_work
from slmtvm.bundle.manifest import TargetEntry
from slmtvm.errors import DeviceError, TargetError
from slmtvm.rpc.client import Device
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.runtime.interface import KernelTime
from slmtvm.schedules.kernel import Kernel
from slmtvm.target import Target, known_targets
from slmtvm.tuning.measuring import program_seconds
from slmtvm.tuning.program import Situation, build_program

_LIMIT_ROUNDS, _LIMIT_MILLISECONDS = 5, 50.0
_LIMIT_TIMEOUT = 120.0  # seconds


class DeviceMachine:
    """A device, as ``slmtvm.bench.machine.Machine`` has it."""

    def __init__(self, there: DeviceBundle) -> None:
        self._there = there
        self._spans: list[tuple[Stamp, Stamp]] = []
        device = there.device.info()
        name = device.get("board") or device.get("model") or there.device.key
        through = f" behind {' '.join(device['exec'])}" if device["exec"] else ""
        self.cpu = f"{name}{through}"
        self.bundle, self.info = Path(there.bundle.path), there.info

    def open(self) -> Opened:
        prompt = min(FIRST_PROMPT, int(self.info["context"]))
        found: dict[str, Any] = {}
        stamps = []
        for entry in self._there.objects("load", self._source, str(prompt)):
            found |= entry
            if "busy" in entry:
                stamps.append(_stamp(entry))
        return Opened(
            found["how"], busy_between([(stamps[0], stamps[1])]), found["load"], found["map"],
            found["first"], prompt, found["resident"],
        )  # fmt: skip

    @contextmanager
    def phases(self, threads: int) -> Iterator[DevicePhases]:
        yield DevicePhases(self, threads)

    def limits(self, working_set: int) -> DeviceLimits:
        entry = self._there.bundle.manifest.targets[self._there.target]
        return DeviceLimits(
            self._there.device, _alike(self._there.target, entry), working_set
        )  # fmt: skip

    def busy(self) -> Busy:
        return busy_between(self._spans)

    def steps(self, threads: int, profiled: bool, steps: Sequence[str]) -> list[dict[str, Any]]:
        """The results of ``steps`` as device_bench.c has them, in order."""
        entries = self._there.objects(
            "bench", str(threads), str(int(profiled)), self._source, *steps
        )
        stamps = [_stamp(entry) for entry in entries if "busy" in entry]
        self._spans.append((stamps[0], stamps[-1]))
        found = [entry for entry in entries if "step" in entry]
        if [entry["step"] for entry in found] != list(steps):
            raise DeviceError("measured something else than was asked for", where=self._there.where)
        return found

    @property
    def _source(self) -> str:
        """How many tokens of a source are read before anything else."""
        encoded = self.info["kind"] == "encoder-decoder"
        return str(self.info["source_context"] if encoded else 0)


class DevicePhases:
    """One number of threads: every phase once by kernel, and timed."""

    def __init__(self, machine: DeviceMachine, threads: int) -> None:
        self._machine, self._threads = machine, threads
        self._plan, self._kernels = PhasePlan.of(machine.info), machine.info["kernels"]

    def working_set(self) -> float:
        plan = self._plan
        once = _decode(0, 1) if plan.decoder else _prefill(1)
        (found,) = self._machine.steps(self._threads, True, [once])
        return total_work(self._kernels, self._calls(found), 0).bytes_read

    def profiles(self) -> list[Profile]:
        plan = self._plan
        tokens = plan.profiled_prefill
        found = [Profile(f"{plan.phase} {tokens}", attended(0, tokens),
                         self._times(self._profiled[_prefill(tokens)]))]  # fmt: skip
        if plan.decoder:
            position = plan.profiled_position
            times = self._times(self._profiled[_decode(position, plan.count)])
            found.append(
                Profile(f"decode at {position}", attended(position, plan.count), times)
            )  # fmt: skip
        return found

    def timed(self) -> list[Timed]:
        plan = self._plan
        milliseconds = int(1e3 * phases.LEAST_SECONDS)
        prefills = [_prefill(n, phases.REPETITIONS, milliseconds) for n in plan.prefills]
        backwards = plan.positions[::-1]  # stepping back keeps what lies before
        decodes = [_decode(position, plan.count) for position in backwards]
        results = self._machine.steps(self._threads, False, [*prefills, *decodes])
        found = [
            Timed(plan.phase, self._threads, 0, tokens, 1, result["times"],
                  self._calls(self._profiled[_prefill(tokens)]))
            for tokens, result in zip(plan.prefills, results, strict=False)
        ]  # fmt: skip
        later = [
            Timed("decode", self._threads, position, plan.count, plan.count, result["times"],
                  self._calls(self._profiled[step]))
            for position, step, result in zip(
                backwards, decodes, results[len(prefills) :], strict=True
            )
        ]  # fmt: skip
        return found + later[::-1]

    @cached_property
    def _profiled(self) -> dict[str, dict[str, Any]]:
        """By step, what was measured by kernel."""
        plan = self._plan
        steps = [_prefill(tokens) for tokens in plan.prefills]
        steps += [_decode(position, plan.count) for position in plan.positions[::-1]]
        return dict(zip(steps, self._machine.steps(self._threads, True, steps), strict=True))

    def _times(self, result: Mapping[str, Any]) -> dict[str, KernelTime]:
        return {
            kernel["name"]: KernelTime(*times)
            for kernel, times in zip(self._kernels, result["kernels"], strict=True)
        }

    def _calls(self, result: Mapping[str, Any]) -> dict[str, int]:
        return {name: time.calls for name, time in self._times(result).items()}


class DeviceLimits:
    """The probes of ``LimitProbe`` in programs for a device."""

    def __init__(self, device: Device, target: Target, working_set: int) -> None:
        isa = probes.isa_of(target)
        pieces = max(-(-working_set // probes.PIECE_BYTES), 1)
        self._device, self._working_set = device, pieces * probes.PIECE_BYTES
        self._dots = probes.dot_kernels(isa, DOT_BLOCKS)
        readers = [probes.read_kernel(ahead, pieces) for ahead in probes.READ_AHEAD]
        self._reader = _program(readers, target)
        self._multipliers = [_program([dot.kernel], target) for dot in self._dots]

    def measure(self, threads: int) -> Limits:
        """The limits for ``threads`` threads, which divide the work evenly."""
        passes = 1 / self._best(self._reader, threads)
        multiply_adds = max(
            DOT_BLOCKS * dot.block_multiply_adds / self._best(program, threads)
            for dot, program in zip(self._dots, self._multipliers, strict=True)
        )
        return Limits(threads, self._working_set, passes * self._working_set, multiply_adds)

    def _best(self, program: bytes, threads: int) -> float:
        """The least seconds of a call of any of a program's kernels."""
        result = self._device.run(
            program,
            ["--rounds", str(_LIMIT_ROUNDS), "--millis", str(_LIMIT_MILLISECONDS),
             "--threads", str(threads)],
            timeout_s=_LIMIT_TIMEOUT,
        )  # fmt: skip
        if not result.ok:
            raise DeviceError(
                f"its limits cannot be measured: {result.reason}",
                where=f"device {self._device.key} at {self._device.address}",
            )
        found = program_seconds(result.stdout.decode(errors="replace"))
        return min(min(seconds) for seconds in found.values())


def _program(kernels: Sequence[Kernel], target: Target) -> bytes:
    return build_program(kernels, target, Situation(), fills=probes.fills)


def _prefill(tokens: int, times: int = 1, milliseconds: int = 0) -> str:
    return f"prefill:{tokens}:{times}:{milliseconds}"


def _decode(position: int, tokens: int) -> str:
    return f"decode:{position}:{tokens}"


def _stamp(entry: Mapping[str, Any]) -> Stamp:
    seconds, stat, own = entry["busy"]
    return stamp(seconds, stat, own, entry["ticks"])


def _alike(name: str, entry: TargetEntry) -> Target:
    """The target whose instructions reach the limits; of somebody's own, the nearest."""
    if name in known_targets():
        return Target.load(name)
    known = [Target.load(n) for n in known_targets()]
    fitting = [
        t for t in known if t.arch == entry.arch and set(t.requires) <= set(entry.requires)
    ]  # fmt: skip
    if not fitting:
        raise TargetError(f"no target of {entry.arch} is known that it could do", where=name)
    return max(fitting, key=lambda t: len(t.requires))
