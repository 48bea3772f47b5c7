"""Layers are tuned on the devices of a tracker, whatever happens to some of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.cluster import connected
from slmtvm.errors import RpcError, TargetError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.building import build_on
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.measuring import Batch
from slmtvm.tuning.records import RecordFile, RecordLog, read_records
from slmtvm.tuning.tasks import Workload
from slmtvm.tuning.tuner import Budget, tune_plan
from tests.passes import toy
from tests.ray_cluster import ray_cluster
from tests.schedules.harness import emulators
from tests.tuning.farm import Farm, farm
from tests.tuning.tasks import HOST, KEY

DECODE = Workload(prompt=0, generate=100)


@pytest.fixture(scope="module")
def devices() -> Iterator[Farm]:
    with farm() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "emulated"),
    [
        ("riscv64-rvv", "vlen=128"),
        pytest.param("riscv64-rvv", "vlen=256", marks=pytest.mark.exhaustive),
        pytest.param("cortex-a78", "", marks=pytest.mark.exhaustive),
    ],
)
def test_a_layer_is_tuned_on_an_emulated_board(
    name: str, emulated: str, devices: Farm, tmp_path: Path
) -> None:
    target, key = Target.load(name), name + emulated.replace("vlen=", "-")
    (command,) = [c for c in emulators(target) if emulated in " ".join(c)]
    devices.runner(key, command)
    plan = build_plan(lower(fuse(toy.decoder("int4")), target), {})
    file = RecordFile(tmp_path / "r.jsonl")
    with DeviceMeasurer(target, devices.address, key, wait_s=30) as measurer:
        report = tune_plan(
            plan, target, measurer, file, budget=Budget(trials=8), workload=DECODE
        )  # fmt: skip
    records = read_records(file.path)
    assert report.trials == 8 and not report.failures
    assert {r.target for r in records} == {name}
    assert all(r.device["key"] == key and r.device["exec"] == command for r in records)
    choice = RecordedChoice(RecordLog.of(records), target)
    tuned = build_plan(lower(fuse(toy.decoder("int4")), target, choose=choice), {})
    names = set(tuned.kernels) - set(plan.kernels)
    assert bool(names) == bool(choice.used)


@pytest.mark.slow
def test_a_device_of_another_kind_is_refused_before_it_measures(devices: Farm) -> None:
    foreign = "cortex-a78" if HOST.arch != "aarch64" else "riscv64-rvv"
    devices.runner("other")
    measuring = DeviceMeasurer(Target.load(foreign), devices.address, "other", wait_s=30)
    batch = Batch(KEY, [linear.default_knobs(KEY.shape, isas.get(HOST.isa))])
    with measuring as measurer, pytest.raises(TargetError, match=f"the target {foreign} is"):
        measurer.measure(batch)


@pytest.mark.slow
def test_a_batch_is_divided_among_devices_and_survives_the_loss_of_one(devices: Farm) -> None:
    runners = [devices.runner("host") for _ in range(2)]
    settings = TEMPLATES["linear"].settings(KEY.shape, isas.get(HOST.isa))[1:9]
    batch = Batch(KEY, settings, rounds=2, milliseconds=0.1, limit=20)
    with DeviceMeasurer(HOST, devices.address, "host", wait_s=30) as measurer:
        both = measurer.measure(batch)
        assert len(measurer._held) == 2
        runners[0].kill()
        one = measurer.measure(batch)
        assert len(measurer._held) == 1
    for measured in (both, one):
        assert [m.knobs for m in measured] == settings
        assert all(m.failure is None and m.seconds for m in measured)
    runners[1].kill()
    lost = DeviceMeasurer(HOST, devices.address, "host", wait_s=1)
    with lost, pytest.raises(RpcError, match="no device 'host'"):
        lost.measure(batch)


@pytest.fixture
def cluster() -> Iterator[str]:
    with ray_cluster() as address:
        yield address


@pytest.mark.exhaustive
def test_a_cluster_builds_what_devices_measure(devices: Farm, cluster: str) -> None:
    devices.runner("by-cluster")
    settings = TEMPLATES["linear"].settings(KEY.shape, isas.get(HOST.isa))[1:3]
    with (
        connected(cluster) as ray,
        DeviceMeasurer(
            HOST, devices.address, "by-cluster", wait_s=30, builder=build_on(ray)
        ) as measurer,
    ):
        measured = measurer.measure(Batch(KEY, settings))
    assert [m.knobs for m in measured] == settings
    assert all(m.failure is None and m.seconds for m in measured)
