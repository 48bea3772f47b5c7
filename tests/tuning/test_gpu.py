"""Kernels of a GPU are tuned like others: built, run on a device, compared, recorded.

The GPU is emulated, so that its times say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slmtvm.codegen.cuda.nvrtc import compile_cubin, is_installed
from slmtvm.errors import TargetError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from slmtvm.tuning import gpu_program
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.measuring import Batch
from slmtvm.tuning.records import RecordFile, RecordLog, read_records
from slmtvm.tuning.tune import tune
from slmtvm.tuning.tuner import Budget, tune_plan
from tests.emulation.cuda.emulator import build_driver, build_text
from tests.passes import toy
from tests.tuning.farm import Farm, farm
from tests.tuning.tasks import KEY
from tests.tuning.test_devices import DECODE

pytestmark = pytest.mark.skipif(
    not is_installed(12), reason="NVRTC is not installed: pip install 'slmtvm[cuda]'"
)

GPU = Target.load("cuda-sm90")
Change = Callable[[str], str]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farm, Path]]:
    """A device whose programs find an emulated GPU, and the folder of its kernels."""
    folder = tmp_path_factory.mktemp("gpu")
    build_driver(folder)
    given = [f"LD_LIBRARY_PATH={folder}", f"EMULATED_KERNELS={folder / 'kernels.so'}"]
    with farm() as made:
        made.runner(GPU.name, ["env", *given])
        yield made, folder


def emulate(monkeypatch: pytest.MonkeyPatch, folder: Path, change: Change = lambda t: t) -> None:
    """What is compiled for the GPU, after a ``change`` of its text, is what the emulated one runs
    from then on."""

    def compiled(text: str, arch: str, release: int) -> bytes:
        entries = re.findall(r"__launch_bounds__\(.*\)\n +(\w+)\(", text)
        build_text(change(text), entries, folder)
        return compile_cubin(text, arch, release)

    monkeypatch.setattr(gpu_program, "compile_cubin", compiled)


@pytest.mark.slow
def test_a_layer_is_tuned_on_an_emulated_gpu(
    board: tuple[Farm, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, folder = board
    emulate(monkeypatch, folder)
    plan = build_plan(lower(fuse(toy.decoder("int4")), GPU), {})
    file = RecordFile(tmp_path / "r.jsonl")
    with DeviceMeasurer(GPU, devices.address, GPU.name, wait_s=30) as measurer:
        report = tune_plan(plan, GPU, measurer, file, budget=Budget(trials=2), workload=DECODE)
    assert report.trials == 2 and not report.failures
    records = read_records(file.path)
    assert {(r.target, r.isa) for r in records} == {(GPU.name, "cuda")}
    assert all(r.seconds and r.device["exec"] for r in records)
    choice = RecordedChoice(RecordLog.of(records), GPU)
    tuned = build_plan(lower(fuse(toy.decoder("int4")), GPU, choose=choice), {})
    assert bool(set(tuned.kernels) - set(plan.kernels)) == bool(choice.used)


@pytest.mark.slow
def test_a_candidate_that_computes_other_bytes_is_no_choice(
    board: tuple[Farm, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, folder = board

    def wrong(text: str) -> str:
        before, after = text.split("SLM_DEVICE void candidate_1(")
        return (
            f"{before}SLM_DEVICE void candidate_1({after.replace('slm_dp4a(', '1 + slm_dp4a(', 1)}"
        )

    emulate(monkeypatch, folder, wrong)
    settings = [
        {"mr": 1, "nv": nv, "pf": 0, "ku": 16, "gu": 1, "ps": 0, "rt": 1, "teams": teams}
        for nv, teams in ((1, 0), (2, 8))
    ]
    with DeviceMeasurer(GPU, devices.address, GPU.name, wait_s=30) as measurer:
        first, second = measurer.measure(Batch(KEY, settings, rounds=2))
    assert first.failure == "computes other bytes than the default"
    assert second.failure is None and second.seconds


@pytest.mark.slow
def test_what_is_not_done_on_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="2 threads do not"):
        tune("model.onnx", GPU, records=tmp_path / "r", threads=2)
    with pytest.raises(TargetError, match="leave the static filter out"):
        tune("model.onnx", GPU, records=tmp_path / "r", static_filter=True)
