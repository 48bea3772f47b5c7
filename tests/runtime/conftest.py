"""The toy bundles, compiled once for each test process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_encoder

ToyBundle = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> ToyBundle:
    """The toy "decoder"'s or "encoder"'s bundle for this machine, and what it makes of hidden
    tokens: "none", "keys" or "skip"; tests do not change it."""

    @cache
    def bundle(name: str, mask: str) -> Path:
        make = toy_decoder if name == "decoder" else toy_encoder
        path = tmp_path_factory.mktemp("toy") / f"{name}-{mask}.slm"
        write_bundle(path, [(Target.load("host"), make(mask=mask))])
        return path

    return bundle


@pytest.fixture(scope="session")
def decoder(toy_bundle: ToyBundle) -> Path:
    return toy_bundle("decoder", "none")


@pytest.fixture(scope="session")
def encoder(toy_bundle: ToyBundle) -> Path:
    return toy_bundle("encoder", "none")
