"""A bundle is measured on a device as it is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.bench import BenchReport, on_device
from slmtvm.bench.measure import _measured
from slmtvm.bench.on_device import DeviceMachine
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.rpc.local import local_device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def short_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "_LIMIT_MILLISECONDS", 1.0)
        yield


@pytest.fixture(scope="module")
def there(decoder: Path) -> Iterator[DeviceBundle]:
    with local_device("--memory", "500M") as device:
        yield DeviceBundle(device, decoder)


@pytest.fixture(scope="module")
def remote(there: DeviceBundle, short_measurements: None, short_limits: None) -> BenchReport:
    return _measured(DeviceMachine(there), [1, 2], True, lambda _: None)


def test_the_same_phases_are_measured_as_here(remote: BenchReport, report: BenchReport) -> None:
    assert (remote.target, remote.kind, remote.context) == (
        report.target, report.kind, report.context,
    )  # fmt: skip
    assert [(r.phase, r.threads, r.position, r.tokens) for r in remote.rates] == [
        (r.phase, r.threads, r.position, r.tokens) for r in report.rates
    ]
    assert all(r.tokens_per_second > 0 and 0 < r.p50_ms <= r.p99_ms for r in remote.rates)
    assert min(remote.map_ms, remote.load_ms, remote.first_token_ms) > 0


def test_kernels_have_the_calls_and_the_work_that_they_have_here(
    remote: BenchReport, report: BenchReport
) -> None:
    def works(of: BenchReport) -> set[tuple[object, ...]]:
        return {
            (k.phase, k.threads, k.kernel, k.calls, k.bytes_read, k.multiply_adds)
            for k in of.kernels
        }

    assert works(remote) == works(report)
    assert all(k.seconds > 0 and 0 <= k.overhead_seconds < k.seconds for k in remote.kernels)


def test_the_limits_of_the_device_bound_the_rates(remote: BenchReport, report: BenchReport) -> None:
    assert [limit.threads for limit in remote.limits] == [1, 2]
    assert remote.limits[0].working_set == report.limits[0].working_set
    for ours, theirs in zip(remote.rates, report.rates, strict=True):
        limit = next(x for x in remote.limits if x.threads == ours.threads)
        other = next(x for x in report.limits if x.threads == theirs.threads)
        assert ours.read_limit and theirs.read_limit
        work = limit.read_bytes_per_second / ours.read_limit
        assert work == pytest.approx(other.read_bytes_per_second / theirs.read_limit)


def test_an_encoder_has_prefills_alone(encoder: Path, short_measurements: None) -> None:
    with local_device("--memory", "500M") as device:
        found = _measured(DeviceMachine(DeviceBundle(device, encoder)), [1], False, lambda _: None)
    assert {rate.phase for rate in found.rates} == {"encode"} and not found.kernels
