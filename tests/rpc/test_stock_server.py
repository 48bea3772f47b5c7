"""A device where TVM's own RPC server runs, with TVM's own tracker: it runs programs, and tunes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.errors import RpcError, TargetError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.rpc import stock_server
from slmtvm.rpc.client import Device, devices
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.rpc.target_check import check_target
from slmtvm.runtime import load
from slmtvm.schedules import isa as isas
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.measuring import Batch
from slmtvm.tuning.records import RecordFile, RecordLog, read_records
from slmtvm.tuning.tasks import Workload
from slmtvm.tuning.tuner import Budget, tune_plan
from slmtvm.verify.on_device import DeviceSession
from tests.codegen.elf import Elf
from tests.passes import toy
from tests.rpc.inputs import assert_a_job_gets_its_inputs
from tests.rpc.processes import StockServer, StockTracker, running, wait_until_registered
from tests.tuning.tasks import HOST, KEY

pytestmark = pytest.mark.slow
TOKENS = [5, 3, 99, 8]


@pytest.fixture(scope="module")
def stock() -> Iterator[StockTracker]:
    """A tracker with one server, "stock"."""
    tracker = StockTracker()
    with running(tracker):
        server = StockServer(tracker, "stock")
        with running(server):
            wait_until_registered(tracker, "stock")
            yield tracker
            assert server.alive


@pytest.fixture
def device(stock: StockTracker) -> Iterator[Device]:
    with next(devices(stock.address, "stock", wait_s=60)) as device:
        yield device


def test_a_program_there_is_bounded_and_its_crash_is_not_the_servers(
    device: Device, job: bytes
) -> None:
    assert_a_job_gets_its_inputs(device, job, kilobytes=2500)
    for arguments, status, reason in (
        (["status", "7"], 7, "ended with status 7: said before"),
        (["crash"], -6, "ended with signal 6"),
        (["hang"], None, "killed after 0.5 s"),
        (["leave"], None, "killed after 0.5 s"),
        (["hunger"], 4, "ended with status 4: no memory"),
        (["flood"], None, "killed: it wrote more than 100,000 bytes"),
    ):
        result = device.run(job, arguments, timeout_s=0.5, stdout_limit=100_000)
        assert (result.status, result.ok) == (status, False)
        assert reason in result.reason
        assert len(result.stdout) <= 100_000
        assert device.run(job, ["still", "there"]).stdout == b"still\nthere\n"
    assert device.run(b"no program", []).reason.endswith("cannot be executed there")
    with pytest.raises(RpcError, match="several lines"):
        device.run(job, ["two\nlines"])
    device.close()
    with pytest.raises(RpcError, match="was given back already"):
        device.info()


def test_it_says_what_it_is_and_is_refused_for_another_target(device: Device) -> None:
    info = device.info()
    assert info["server"] == "TVM's own"
    assert (info["machine"], info["exec"]) == (HOST.arch, [])
    assert info["cores"]
    check_target(device, HOST)
    foreign = "cortex-a78" if HOST.arch != "aarch64" else "riscv64-rvv"
    with pytest.raises(TargetError, match=f"the target {foreign} is"):
        check_target(device, Target.load(foreign))


def test_a_layer_is_tuned_there_and_compiled_to_the_same_bits(
    stock: StockTracker, tmp_path: Path
) -> None:
    fused = fuse(toy.decoder("int4"))
    plan = build_plan(lower(fused, HOST), {})
    file = RecordFile(tmp_path / "r.jsonl")
    with DeviceMeasurer(HOST, stock.address, "stock", wait_s=60) as measurer:
        report = tune_plan(
            plan, HOST, measurer, file, budget=Budget(trials=4), workload=Workload(0, 100)
        )
        assert report.trials == 4
        assert not report.failures
        records = read_records(file.path)
        assert len(records) >= 4
        assert all(record.device["server"] == "TVM's own" for record in records)
        best = {}  # whatever was not the default, be it faster or not: so there is something to see
        for record in records:
            best[record.key.text] = record.knobs
        choice = RecordedChoice(RecordLog.of(records), HOST)

        def choose(kind: str, shape: object, isa: isas.Isa) -> dict[str, int]:
            chosen = choice(kind, shape, isa)
            text = type(records[0].key)(kind, shape).text
            return best.get(text, chosen)

        tuned = build_plan(lower(fused, HOST, choose=choose), {})
        assert set(tuned.kernels) != set(plan.kernels)
        paths = [tmp_path / "default.slm", tmp_path / "tuned.slm"]
        for path, made in zip(paths, (plan, tuned), strict=True):
            write_bundle(path, [(HOST, made)])
        outputs = [load(path).eval_all(TOKENS) for path in paths]
        with measurer.device() as device:
            outputs.append(DeviceSession(DeviceBundle(device, paths[1])).eval_all(TOKENS))
    for other in outputs[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), outputs[0].view(np.uint32))


@pytest.mark.parametrize(("arch", "machine"), [("x86_64", 62), ("aarch64", 183), ("riscv64", 243)])
def test_the_library_that_runs_programs_is_for_any_libc(arch: str, machine: int) -> None:
    library = Elf(stock_server._library(arch))
    assert (library.machine, library.needed) == (machine, [])
    assert library.exports == {"__tvm_ffi_slm_run", "__tvm_ffi_slm_read"}


@pytest.mark.exhaustive
def test_what_a_lost_server_was_to_measure_the_next_one_does(stock: StockTracker) -> None:
    settings = TEMPLATES["linear"].settings(KEY.shape, isas.get(HOST.isa))[1:5]
    batch = Batch(KEY, settings, rounds=2, milliseconds=0.1, limit=20)
    lost = StockServer(stock, "two")
    with running(lost):
        wait_until_registered(stock, "two")
        with DeviceMeasurer(HOST, stock.address, "two", wait_s=60) as measurer:
            assert all(m.seconds for m in measurer.measure(batch))
            kept = StockServer(stock, "two")
            with running(kept):
                wait_until_registered(stock, "two", 2)
                lost.end(signal.SIGKILL)
                assert all(m.seconds for m in measurer.measure(batch))
