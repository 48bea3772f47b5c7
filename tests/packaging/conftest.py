"""A signed toy bundle for three architectures, its keys, and a package of it for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import generate_keys, key_signer
from slmtvm.bundle.write import Checked, write_bundle
from slmtvm.packaging import package
from slmtvm.runtime.selftest import record_selftest
from slmtvm.target import Target
from tests.packaging.devices import TARGETS
from tests.runtime.toy import toy_decoder, toy_weights


@dataclass(frozen=True)
class Keys:
    """A pair of keys as files in PEM."""

    private: Path
    public: Path


@dataclass(frozen=True)
class Release:
    """Signed bundles of one toy model, ``bundle(counter)``; tests do not change them."""

    folder: Path
    keys: Keys

    @cache  # noqa: B019  # lives as long as the tests
    def bundle(self, counter: int) -> Path:
        """The bundle of a release; another ``counter`` is one of other weights."""
        path = self.folder / f"{counter}" / "toy.slm"
        others = TARGETS if counter == 1 else ()  # of the first release only: they take time
        names = list(dict.fromkeys((Target.load("host").name, *others)))

        def check(folder: Path) -> Checked:
            expected = record_selftest(folder, Target.load("host").name)
            assert expected is not None
            return Checked({"skipped": "a toy"}, dict.fromkeys(names, expected))

        plan = toy_decoder(toy_weights(seed=counter))
        write_bundle(path, [(Target.load(n), plan) for n in names], tokenizer=b"{}", check=check)
        sign_bundle(path, key_signer(self.keys.private), counter=counter, version=f"1.{counter}.0")
        return path

    @cache  # noqa: B019
    def tarball(self, counter: int, target: str) -> Path:
        """The release's signed package for slm-install."""
        path = self.folder / f"{counter}" / f"{target}.tar.gz"
        signer = key_signer(self.keys.private)
        return package(self.bundle(counter), "tar.gz", path, target=target, signer=signer)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    made = Keys(folder / "key.pem", folder / "pub.pem")
    generate_keys(made.private, made.public)
    return made


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("other-keys")
    made = Keys(folder / "key.pem", folder / "pub.pem")
    generate_keys(made.private, made.public)
    return made


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Release:
    return Release(tmp_path_factory.mktemp("release"), keys)
