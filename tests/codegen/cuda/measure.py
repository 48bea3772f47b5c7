"""Measures a bundle as briefly as possible, and no limits of the machine:
python -m tests.codegen.cuda.measure BUNDLE."""

from __future__ import annotations

import sys

from slmtvm.bench import bench, phases
from slmtvm.bench.limits import Limits
from slmtvm.bench.machine import LimitSource, LocalMachine


class _Any:
    def measure(self, threads: int) -> Limits:
        return Limits(threads, 1, 1.0, 1.0)


def _limits(_machine: LocalMachine, _working_set: int) -> LimitSource:
    return _Any()


def main() -> None:
    phases.LEAST_SECONDS, phases.REPETITIONS, phases.DECODE_TOKENS = 0.001, 1, 2
    phases.POSITIONS, phases.PREFILLS = (), (16,)
    LocalMachine.limits = _limits  # type: ignore[assignment,method-assign]
    print(bench(sys.argv[1], threads=[1], kernels=False))


if __name__ == "__main__":
    main()
