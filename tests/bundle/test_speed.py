"""A manifest states the speed that a bench measured, and what it was measured on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slmtvm.bench import bench
from slmtvm.bundle import Bundle
from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import key_signer
from slmtvm.bundle.speed import read_speed
from slmtvm.errors import SlmError
from tests.bundle.test_schema import VALIDATOR
from tests.packaging.conftest import Keys, Release, keys, release  # noqa: F401


@pytest.mark.slow
def test_a_report_of_bench_becomes_a_part_of_what_is_signed(
    release: Release,  # noqa: F811
    keys: Keys,  # noqa: F811
    tmp_path: Path,
) -> None:
    bundle = shutil.copytree(release.bundle(1), tmp_path / "x.slm")
    report = bench(bundle, threads=[1], kernels=False)
    (tmp_path / "bench.json").write_text(json.dumps(report.to_json()))
    speed = read_speed(tmp_path / "bench.json", "board")
    sign_bundle(bundle, key_signer(keys.private), speed=speed)
    VALIDATOR.validate(json.loads((bundle / "manifest.json").read_text()))
    stated = Bundle.open(bundle).manifest.extra["bench"]
    assert stated["cpu"] == report.cpu and len(stated["rates"]) == len(report.rates)
    assert stated["rates"][0]["tokens_per_second"] == report.rates[0].tokens_per_second


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rates": 3}', '{"rates": [{}]}', "[" * 9999])
def test_another_file_is_no_report(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SlmError, match=r"x\.json: is no report of"):
        read_speed(tmp_path / "x.json", "board")
    with pytest.raises(SlmError, match="'guessed' must be one of"):
        read_speed(tmp_path / "x.json", "guessed")
