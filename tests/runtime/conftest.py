"""The toy bundles, compiled once for each test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_encoder


def _bundle(factory: pytest.TempPathFactory, name: str, plan: Plan) -> Path:
    path = factory.mktemp("toy") / f"{name}.slm"
    write_bundle(path, [(Target.load("host"), plan)])
    return path


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy decoder's bundle for this machine; tests do not change it."""
    return _bundle(tmp_path_factory, "decoder", toy_decoder())


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy encoder's bundle for this machine; tests do not change it."""
    return _bundle(tmp_path_factory, "encoder", toy_encoder())


@pytest.fixture(scope="session")
def keys_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy decoder, of which hidden tokens are keys without weight."""
    return _bundle(tmp_path_factory, "keys_decoder", toy_decoder(mask="keys"))


@pytest.fixture(scope="session")
def keys_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy encoder, of which hidden tokens are keys without weight."""
    return _bundle(tmp_path_factory, "keys_encoder", toy_encoder(mask="keys"))


@pytest.fixture(scope="session")
def skip_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy decoder, of which hidden tokens are left out."""
    return _bundle(tmp_path_factory, "skip_decoder", toy_decoder(mask="skip"))


@pytest.fixture(scope="session")
def skip_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy encoder, of which hidden tokens are left out."""
    return _bundle(tmp_path_factory, "skip_encoder", toy_encoder(mask="skip"))
