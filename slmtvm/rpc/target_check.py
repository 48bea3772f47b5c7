"""Whether a device can run what is compiled for a target, before hours are spent on it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from slmtvm.errors import TargetError
from slmtvm.rpc.client import Device
from slmtvm.rpc.program import build_program
from slmtvm.target import Target

_SECONDS = 30.0


def check_target(device: Device, target: Target) -> None:
    """Raise TargetError, with what is wrong, where ``device`` cannot run programs for ``target``.

    A program for the target asks the CPU itself, through whatever the runner starts programs:
    emulators and boards behind ssh answer for themselves.
    """
    where = f"device {device.key} at {device.address}"
    info = device.info()
    if not info["exec"] and info["machine"] != target.arch:
        raise TargetError(
            f"is {info['machine']} ({info['model'] or 'no model name'}), the target {target.name} "
            f"is {target.arch}",
            where=where,
        )
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        build_program({}, target, program)
        executable = program.read_bytes()
    result = device.run(executable, ["requires"], timeout_s=_SECONDS)
    device.forget(executable)
    if not result.ok:
        raise TargetError(
            f"cannot run programs for the target {target.name}: {result.reason}", where=where
        )
    if result.stdout:
        raise TargetError(
            f"lacks {result.stdout.decode().strip()}, which the target {target.name} requires",
            where=where,
        )
