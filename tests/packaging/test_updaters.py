"""Formats of updaters and build systems by the real tools: taken whole, refused where altered."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from slmtvm.errors import SlmError
from slmtvm.packaging import FORMATS, Options, package
from slmtvm.packaging.contents import Contents
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, Device, tool
from tests.packaging.test_formats import altered, check, run, succeed
from tests.packaging.updaters import calling, certify, write


@pytest.fixture
def device(contents: Contents, keys: Keys, tmp_path: Path) -> Device:
    """A root for slm-install on this machine, which an updater calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for file in contents.programs:
        if file.path in ("bin/slm-install", "bin/slm-verify"):
            shutil.copy(file.source, programs / Path(file.path).name)
    return Device(tmp_path / "device", keys.public, programs, ["sh"], os.environ["PATH"])


# rauc


@pytest.mark.slow
def test_rauc_takes_a_bundle_out_of_which_the_model_works(
    contents: Contents, options: Options, keys: Keys, tmp_path: Path
) -> None:
    rauc, unpack = tool("rauc", "rauc"), tool("unsquashfs", "squashfs-tools")
    bundle = write("rauc", contents, options, tmp_path / "made" / "model.raucb")
    told = succeed(rauc, "--keyring", options.certificate, "info", bundle)
    assert "demo-board" in told and re.search(r"Version:\s+'1.1.0'", told) and "verity" in told
    succeed(rauc, "--keyring", options.certificate, "extract", bundle, tmp_path / "out")
    succeed(unpack, "-d", tmp_path / "model", tmp_path / "out" / "model.squashfs")
    check(tmp_path / "model/bin/slm-selftest", tmp_path / "model/bundle", keys)


def test_rauc_refuses_an_altered_bundle_and_another_certificate(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    rauc = tool("rauc", "rauc")
    bundle = write("rauc", contents, options, tmp_path / "made" / "model.raucb")
    (tmp_path / "altered").mkdir()
    for seed in range(3):
        damaged = altered(bundle, tmp_path / "altered", seed=seed)
        result = run(rauc, "--keyring", options.certificate, "extract", damaged, tmp_path / "o")
        assert result.returncode != 0 and not (tmp_path / "o").exists()
    other, _ = certify(tmp_path, "somebody")
    assert run(rauc, "--keyring", other, "info", bundle).returncode != 0


# swupdate


def swupdate(archive: Path, trusted: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    program = tool("swupdate", "swupdate")
    return run(program, "-k", trusted, "-H", "demo:demo-board", "-i", archive, **options)


def test_swupdate_hands_the_package_to_slm_install(
    contents: Contents, options: Options, device: Device, tmp_path: Path
) -> None:
    archive = write("swupdate", contents, options, tmp_path / "made" / "model.swu")
    done = swupdate(archive, options.certificate, env=calling(device), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert device.version() == "1.1.0"
    assert not Path("/var/tmp/slm-toy.tar.gz").exists()


def test_swupdate_refuses_what_was_altered_foreign_or_for_another_board(
    contents: Contents, options: Options, device: Device, tmp_path: Path
) -> None:
    archive = write("swupdate", contents, options, tmp_path / "made" / "model.swu")
    (tmp_path / "altered").mkdir()
    environment = calling(device)
    other, _ = certify(tmp_path, "somebody")
    elsewhere = write(
        "swupdate", contents, replace(options, compatible="toaster"), tmp_path / "e" / "t.swu"
    )
    damaged = altered(archive, tmp_path / "altered")
    for given, trusted in (
        (damaged, options.certificate), (archive, other), (elsewhere, options.certificate),
    ):  # fmt: skip
        done = swupdate(given, trusted, env=environment, cwd=tmp_path)
        assert done.returncode != 0, given
    assert not device.root.exists()


# mender


@pytest.fixture(scope="module")
def mender_key(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    private = serialization.load_pem_private_key(options.certificate_key.read_bytes(), None)
    path = tmp_path_factory.mktemp("mender") / "pub.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(private.public_key().public_bytes(serialization.Encoding.PEM, form))
    return path


def test_mender_artifact_validates_an_artifact_and_no_altered_one(
    contents: Contents, options: Options, mender_key: Path, tmp_path: Path
) -> None:
    program = tool("mender-artifact", "mender-artifact")
    artifact = write("mender", contents, options, tmp_path / "made" / "model.mender")
    succeed(program, "validate", "-k", mender_key, artifact)
    told = succeed(program, "read", "-k", mender_key, artifact)
    assert "demo-board" in told and "slm-toy-1.1.0" in told
    (tmp_path / "altered").mkdir()
    for seed in range(3):
        damaged = altered(artifact, tmp_path / "altered", seed=seed)
        assert run(program, "validate", "-k", mender_key, damaged).returncode != 0


@pytest.mark.slow
def test_the_update_module_of_mender_installs_and_rolls_back(
    contents: Contents, options: Options, device: Device, release: Release, tmp_path: Path
) -> None:
    artifact = write("mender", contents, options, tmp_path / "made" / "model.mender")
    module = next(f.source for f in contents.programs if f.path == "bin/slm-mender")
    tree = tmp_path / "module"
    (tree / "files").mkdir(parents=True)
    (tree / "tmp").mkdir()
    with tarfile.open(artifact) as tar:
        tar.extract("data/0000.tar.gz", tmp_path, filter="data")
    with tarfile.open(tmp_path / "data/0000.tar.gz") as tar:
        tar.extractall(tree / "files", filter="data")

    def call(state: str) -> str:
        return succeed("sh", module, state, tree, env=calling(device))

    assert call("SupportsRollback") == "Yes\n" and call("NeedsArtifactReboot") == "No\n"
    call("ArtifactRollback")  # of what was never installed
    assert not device.root.exists()
    device.succeed("install", release.tarball(2, HOST))
    refused = run("sh", module, "ArtifactInstall", tree, env=calling(device))
    assert refused.returncode != 0 and "2 was here before" in refused.stderr
    call("ArtifactRollback")
    assert device.version() == "1.2.0"
    shutil.rmtree(device.root)
    call("ArtifactInstall")
    assert device.version() == "1.1.0"
    device.succeed("install", release.tarball(2, HOST))
    call("ArtifactRollback")
    assert device.version() == "1.1.0"
    assert call("ArtifactCommit") == ""


# sysext


def test_a_system_extension_is_whole_by_its_root_hash_and_no_altered_one(
    contents: Contents, options: Options, keys: Keys, tmp_path: Path
) -> None:
    verity, unpack = tool("veritysetup", "cryptsetup-bin"), tool("unsquashfs", "squashfs-tools")
    folder = write("sysext", contents, options, tmp_path / "made" / "extension")
    image, tree = folder / "slm-toy.raw", folder / "slm-toy.verity"
    root = (folder / "slm-toy.roothash").read_text().strip()
    succeed(verity, "verify", image, tree, root)
    succeed(unpack, "-d", tmp_path / "root", image)
    place = tmp_path / "root/usr/lib/slm/toy"
    check(place / "bin/slm-selftest", place / "bundle", keys)
    assert (tmp_path / "root/usr/lib/systemd/system/slm-toy.service").is_file()
    damaged = altered(image, tmp_path)
    assert run(verity, "verify", damaged, tree, root).returncode != 0
    assert run(verity, "verify", image, tree, "0" * 64).returncode != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root opens images")
def test_systemd_takes_an_extension_for_one(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    dissect = tool("systemd-dissect", "systemd-container")
    folder = write("sysext", contents, options, tmp_path / "made" / "extension")
    done = run(dissect, "--json=short", folder / "slm-toy.raw")
    if "loop" in done.stderr or "No such device" in done.stderr or "not permitted" in done.stderr:
        pytest.skip(f"no loop devices here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "SYSEXT_ID=slm-toy" in done.stdout


# all of them


@pytest.mark.parametrize("format", ["sysext", "yocto", "buildroot", "swupdate", "mender"])
def test_equal_input_gives_equal_bytes_but_for_signatures(
    format: str, contents: Contents, options: Options, tmp_path: Path
) -> None:
    found = [
        dict(_pieces(write(format, contents, options, tmp_path / name / "deeper")))
        for name in ("a", "b")
    ]
    assert found[0] == found[1] and found[0]


def _pieces(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a package by their names, without what a signature makes each time anew."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield f"{file.relative_to(path)}", file.read_bytes()
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.name != "manifest.sig" and not entry.name.endswith(".tar.gz"):
                    yield entry.name, tar.extractfile(entry).read()
    else:
        yield "sw-description", path.read_bytes()[:600]  # which has the hashes of the rest


@pytest.mark.parametrize(
    ("format", "missing", "message"),
    [
        ("rauc", "certificate", "--certificate: must be given: what devices trust"),
        ("rauc", "compatible", "--compatible: must be given"),
        ("swupdate", "certificate_key", "--certificate-key: must be given"),
        ("swupdate", "signer", "--key: must be given"),
        ("mender", "compatible", "--compatible: must be given"),
        ("mender", "signer", "--key: must be given"),
        ("image", "signer", "--key: must be given"),
    ],
)
def test_what_a_format_needs_is_asked_for(
    format: str, missing: str, message: str, contents: Contents, options: Options,
    root_tar: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = replace(options, into=root_tar, **{missing: None})
    with pytest.raises(SlmError, match=message):
        write(format, contents, given, tmp_path / "out" / "x")
    assert not (tmp_path / "out" / "x").exists()


def test_keys_that_are_none_are_refused(
    contents: Contents, options: Options, keys: Keys, tmp_path: Path
) -> None:
    _, other_key = certify(tmp_path, "somebody")
    for key, message in (
        (keys.public, "holds no private key in PEM"),
        (keys.private, "must be a key of RSA or ECDSA"),
        (other_key, "is not the key of"),
    ):
        with pytest.raises(SlmError, match=message):
            write("swupdate", contents, replace(options, certificate_key=key), tmp_path / "o" / "x")
    given = replace(options, certificate=keys.public)
    with pytest.raises(SlmError, match="holds no certificate"):
        write("swupdate", contents, given, tmp_path / "o" / "x")


@pytest.mark.slow
def test_a_format_that_is_a_folder_takes_no_other_ones_place(
    release: Release, options: Options, tmp_path: Path
) -> None:
    output = package(
        release.bundle(1), "buildroot", tmp_path / "slm-toy", target=HOST, options=options
    )
    assert (output / "Config.in").is_file()
    with pytest.raises(SlmError, match="exists, and is left alone"):
        package(release.bundle(1), "buildroot", output, target=HOST, options=options)


def test_a_tool_that_is_missing_is_named_with_its_package(
    contents: Contents, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlmError, match=r"mender-artifact: is not here.*apt install mender-art"):
        FORMATS["mender"]([contents], tmp_path / "x.mender", options)
