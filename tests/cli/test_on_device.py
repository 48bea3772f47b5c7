"""``bench --rpc`` and ``verify --rpc``: a tracker's device in the place of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.cli import main
from tests.end_to_end.bundles import bundle_for
from tests.models import model_path
from tests.rpc.processes import Runner, Tracker, running, wait_until_registered


@pytest.mark.slow
def test_a_device_is_verified_and_measured(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = bundle_for(tmp_path_factory, "demo", ("host",))
    (target,) = Bundle.open(bundle).targets
    tracker = Tracker()
    with running(tracker), running(Runner("--tracker", tracker.address, "--key", target)):
        wait_until_registered(tracker, target)
        found = []
        for name, where in (("here", []), ("there", ["--rpc", tracker.address])):
            file = tmp_path / f"{name}.json"
            options = ["--windows", "1", "--window", "48", "--json", str(file)]
            assert main(["verify", str(bundle), str(model_path("demo")), *options, *where]) == 0
            found.append(json.loads(file.read_text()))
        assert found[0] == found[1]
        options = ["--rpc", tracker.address, "--key", target, "--threads", "1", "--brief"]
        assert main(["bench", str(bundle), *options, "--json", str(tmp_path / "bench.json")]) == 0
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert measured["target"] == target and measured["rates"] and not measured["kernels"]
    assert "decode at 0" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [
    (["--key", "board"], "--key: is for devices of a tracker: give --rpc too"),
    (["--tls", "keys"], "--tls: is for devices of a tracker: give --rpc too"),
    (["--rpc", "127.0.0.1:1", "--cores", "0"], "cores of a device are those of its runner"),
    (["--rpc", "127.0.0.1:1"], "tracker 127.0.0.1:1: cannot be reached"),
])  # fmt: skip
def test_options_that_lead_to_no_device_are_refused(
    options: list[str], said: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(bundle), *options]) == 1
    assert said in capsys.readouterr().err
