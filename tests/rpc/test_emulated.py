"""Boards of other ISAs, emulated: they register, run real kernels, and are told from each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import rpc

from slmtvm.errors import TargetError
from slmtvm.rpc.client import devices
from slmtvm.rpc.local import local_device
from slmtvm.rpc.program import build_program
from slmtvm.rpc.target_check import check_target
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.target import Target
from tests.rpc.processes import Runner, Tracker, running, wait_until_registered
from tests.schedules.linear_cases import random_case

SHAPE = linear.LinearShape(3, 64, 96, "int4", "block", group_size=32)
EMULATORS = {
    "cortex-a78": "qemu-aarch64-static -cpu max",
    "riscv64-rvv": "qemu-riscv64-static -cpu rv64,v=true,vlen=256,vext_spec=v1.0",
}


def need(command: str) -> str:
    program = command.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here: apt install qemu-user-static")
    return command


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",  # a riscv64 board is tuned on in tests/tuning
    [pytest.param(n, marks=[pytest.mark.exhaustive] * (n != "cortex-a78")) for n in EMULATORS],
)
def test_an_int4_layer_runs_and_is_timed_on_an_emulated_board(
    name: str, tracker: Tracker, tmp_path: Path
) -> None:
    target = Target.load(name)
    isa = isas.get(target.isa)
    case = random_case(SHAPE, isa)
    kernel = linear.build(SHAPE, isa)
    given = {**case.activations, **linear.pack(SHAPE, isa, linear.Weights(**case.weights))}
    build_program({"layer": kernel}, target, tmp_path / "program")
    options = ("--exec", need(EMULATORS[name]), "--memory", "500M")
    with running(Runner("--tracker", tracker.address, "--key", name, *options)):
        wait_until_registered(tracker, name)
        with next(devices(tracker.address, name, wait_s=30)) as device:
            check_target(device, target)
        client = rpc.connect_tracker("127.0.0.1", tracker.port)
        remote = client.request(name, session_timeout=60)
        remote.upload(bytearray((tmp_path / "program").read_bytes()), "program")
        module, cpu = remote.load_module("program"), remote.cpu()
        buffers = [
            tvm.runtime.tensor(given.get(t.name, np.zeros(t.shape, t.dtype)), cpu)
            for t in kernel.tensors
        ]
        timed = module.time_evaluator("layer@2", cpu, number=1, repeat=3)(*buffers)
        assert len(timed.results) == 3
        assert min(timed.results) > 0
        np.testing.assert_array_equal(buffers[-1].numpy(), case.run(target, isa))
        del module, cpu, buffers, remote
        client.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "emulator", "said"), [
    ("cortex-a78", "qemu-aarch64-static -cpu cortex-a72", "lacks asimddp, which the target"),
    ("riscv64-rvv", "qemu-riscv64-static -cpu rv64", "lacks rvv, which the target"),
    ("cortex-a72", "qemu-riscv64-static", "cannot run programs for the target cortex-a72"),
])  # fmt: skip
def test_an_emulated_board_that_is_not_the_target_is_refused(
    name: str, emulator: str, said: str
) -> None:
    with (
        local_device("--exec", need(emulator)) as device,
        pytest.raises(TargetError, match=said),
    ):
        check_target(device, Target.load(name))
