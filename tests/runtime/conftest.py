"""The toy bundles, compiled once for each test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_encoder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy decoder's bundle for this machine; tests do not change it."""
    path = tmp_path_factory.mktemp("toy") / "decoder.slm"
    write_bundle(path, [(Target.load("host"), toy_decoder())])
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy encoder's bundle for this machine; tests do not change it."""
    path = tmp_path_factory.mktemp("toy") / "encoder.slm"
    write_bundle(path, [(Target.load("host"), toy_encoder())])
    return path
