"""A bundle run by a C program, on this machine or under qemu-user: what the tests of foreign ISAs
use in the place of slmtvm.load."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target
from tests.machines import is_native, lacking

SYSROOTS = {"aarch64": "/usr/aarch64-linux-gnu", "riscv64": "/usr/riscv64-linux-gnu"}
CPUS = {
    "aarch64": ("max",),
    "riscv64": tuple(f"rv64,v=true,vlen={vlen},vext_spec=v1.0" for vlen in (128, 256)),
}
_SOURCE = Path(__file__).parent / "slm_eval.c"
_INCLUDE = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"


@dataclass(frozen=True)
class EmulatedSession:
    """One target's library of a bundle; ``cpu`` is qemu's CPU, None where it runs natively."""

    bundle: Path
    target: Target
    program: Path
    cpu: str | None

    def eval_all(self, tokens: np.ndarray, window: int, threads: int = 1) -> np.ndarray:
        """Logits float32 (len(tokens), vocab), afresh for each ``window`` tokens."""
        return self._rows("all", tokens, window, threads)

    def eval_together(self, tokens: np.ndarray, window: int) -> np.ndarray:
        """The same as ``eval_all``, each window in a session of its own, all of them together."""
        return self._rows("together", tokens, window, 1)

    def encode(self, tokens: np.ndarray, window: int) -> np.ndarray:
        """Output rows float32 (len(tokens), hidden), ``window`` tokens a call."""
        return self._rows("encode", tokens, window, 1)

    def outputs(self, tokens: np.ndarray, threads: int = 1) -> np.ndarray:
        """All outputs of one text, float32, one after the other."""
        return np.frombuffer(self._run("outputs", tokens, 1, threads), np.float32)

    def greedy(self, tokens: np.ndarray, count: int) -> list[int]:
        """The ``count`` most likely tokens one after another."""
        raw = self._run("greedy", tokens, count, 1)
        return np.frombuffer(raw, np.int32).tolist()

    def peak_resident_bytes(self, tokens: np.ndarray, count: int) -> int:
        """The most memory that evaluating ``tokens`` and ``count`` greedy ones took."""
        raw = self._run("memory", tokens, count, 1)
        return int(np.frombuffer(raw, np.int32)[0]) * 1024

    def _rows(self, mode: str, tokens: np.ndarray, window: int, threads: int) -> np.ndarray:
        raw = self._run(mode, tokens, window, threads)
        return np.frombuffer(raw, np.float32).reshape(len(tokens), -1)

    def _run(self, mode: str, tokens: np.ndarray, window: int, threads: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "tokens", Path(folder) / "output"
            source.write_bytes(np.asarray(tokens, np.int32).tobytes())
            command = [*_emulator(self.target, self.cpu), str(self.program)]
            arguments = [str(self.bundle), str(source), str(output), mode, str(threads)]
            result = subprocess.run(
                [*command, *arguments, str(window)], capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            return output.read_bytes()


def open_sessions(bundle: Path, target: Target, folder: Path) -> list[EmulatedSession]:
    """A session for each CPU that can stand for ``target`` here; skips the test if there is none.

    folder: where the program is built.
    """
    native = is_native(target)
    if reason := lacking(target):
        pytest.skip(reason)
    if not native:
        qemu = f"qemu-{target.arch}-static"
        if shutil.which(qemu) is None:
            pytest.skip(f"no {qemu} here")
        if not Path(SYSROOTS[target.arch]).is_dir():
            pytest.skip(f"no C library for {target.arch} in {SYSROOTS[target.arch]}")
    library = bundle / "lib" / f"{target.name}.so"
    program = folder / f"slm_eval_{target.name}"
    zig_cc(
        target.link,
        ["-O1", f"-I{_INCLUDE}", "-o", str(program), str(_SOURCE), str(library),
         f"-Wl,-rpath,{library.parent.resolve()}", "-lpthread"],
    )  # fmt: skip
    cpus = [None] if native else CPUS[target.arch]
    return [EmulatedSession(bundle, target, program, cpu) for cpu in cpus]


def static_emulator(target: Target) -> list[str]:
    """What a static program of ``target`` is run by here: nothing, or qemu.

    Skips the test where this machine cannot run it.
    """
    if reason := lacking(target):
        pytest.skip(reason)
    if is_native(target):
        return []
    qemu = f"qemu-{target.arch}-static"
    if shutil.which(qemu) is None:
        pytest.skip(f"no {qemu} here; on Debian and Ubuntu: apt install qemu-user-static")
    return [qemu, "-cpu", CPUS[target.arch][0]]


def _emulator(target: Target, cpu: str | None) -> list[str]:
    if cpu is None:
        return []
    return [f"qemu-{target.arch}-static", "-cpu", cpu, "-L", SYSROOTS[target.arch]]
