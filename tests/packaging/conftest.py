"""A signed toy bundle for three architectures, its keys, and a package of it for each."""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import generate_keys, key_signer
from slmtvm.bundle.write import Checked, TextFiles, write_bundle
from slmtvm.packaging import Options, package
from slmtvm.packaging.contents import Contents, gather
from slmtvm.runtime.selftest import record_selftest
from slmtvm.target import Target
from tests.packaging.devices import HOST, TARGETS, Device, tool
from tests.packaging.updaters import certify
from tests.runtime.toy import toy_decoder, toy_weights

# Of a distribution, and the one program of a small system.
SHELLS = (pytest.param("sh", marks=pytest.mark.slow), "busybox")


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
        write_bundle(
            path, [(Target.load(n), plan) for n in names], text=TextFiles(b"{}"), check=check
        )
        sign_bundle(path, key_signer(self.keys.private), counter=counter, version=f"1.{counter}.0")
        return path

    @cache  # noqa: B019
    def tarball(self, counter: int, target: str) -> Path:
        """The release's signed package for slm-install."""
        path = self.folder / f"{counter}" / f"{target}.tar.gz"
        signer = key_signer(self.keys.private)
        return package(self.bundle(counter), "tar.gz", path, target=target, options=Options(signer))


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


@pytest.fixture(params=SHELLS)
def device(
    request: pytest.FixtureRequest, release: Release, keys: Keys, tmp_path: Path
) -> Iterator[Device]:
    """This machine with the system's shell, or with nothing but busybox."""
    programs = tmp_path / "programs"
    with tarfile.open(release.tarball(1, HOST)) as tar:
        for member in tar:
            if "/bin/" in member.name:
                member.name = Path(member.name).name
                tar.extract(member, programs, filter="data")
    shell, path = ["sh"], os.environ["PATH"]
    if request.param == "busybox":
        busybox = tool("busybox", "busybox-static")
        applets = tmp_path / "applets"
        applets.mkdir()
        subprocess.run([busybox, "--install", "-s", applets], check=True)
        shell, path = [busybox, "sh"], str(applets)
    memory = Path("/dev/shm")  # where what is flushed is soon there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Device(Path(folder) / "device", keys.public, programs, shell, path)


@pytest.fixture(scope="session")
def contents(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What all these packages hold, linked once."""
    folder = tmp_path_factory.mktemp("contents")
    return gather(Bundle.open(release.bundle(1)), HOST, folder, license="Apache-2.0")


@pytest.fixture(scope="session")
def options(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("certificates")
    certificate, key = certify(folder, "device-maker")
    return Options(key_signer(keys.private), None, certificate, key, "demo-board")


@pytest.fixture
def root_tar(tmp_path: Path) -> Path:
    """A small root file system as mmdebstrap and docker export write them."""
    for name in ("etc", "usr/bin", "opt"):
        (tmp_path / "rootfs" / name).mkdir(parents=True)
    (tmp_path / "rootfs/etc/hostname").write_text("board\n")
    (tmp_path / "rootfs/bin").symlink_to("usr/bin")
    path = tmp_path / "rootfs.tar"
    subprocess.run(["tar", "-C", tmp_path / "rootfs", "-cf", path, "."], check=True)
    return path
