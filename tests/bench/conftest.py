"""Small bundles to measure, compiled once for each test process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.bench import BenchReport, bench, limits, phases
from slmtvm.bundle.write import write_bundle
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.target import Target
from tests.passes import toy
from tests.runtime.toy import toy_encoder


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """No test depends on a time: measure as briefly as possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_SECONDS", 0.001)
        patch.setattr(phases, "LEAST_SECONDS", 0.001)
        yield


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like decoder of two layers, int4."""
    path = tmp_path_factory.mktemp("bench") / "decoder.slm"
    target = Target.load("host")
    info: dict[str, object] = {"family": "llama"}
    write_bundle(path, [(target, build_plan(lower(fuse(toy.decoder()), target), info))])
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose kernels say nothing of their work."""
    path = tmp_path_factory.mktemp("bench") / "encoder.slm"
    write_bundle(path, [(Target.load("host"), toy_encoder())])
    return path


@pytest.fixture(scope="session")
def report(decoder: Path, short_measurements: None) -> BenchReport:
    """The decoder measured with one thread and two."""
    return bench(decoder, threads=[1, 2])
