"""Formats of updaters and build systems by the real tools: taken whole, refused where altered."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from slmtvm.bundle import Bundle
from slmtvm.bundle.signature import key_signer
from slmtvm.errors import SlmError
from slmtvm.packaging import FORMATS, Options, package
from slmtvm.packaging.contents import Contents, gather
from tests.packaging.board import make_disk, take
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, Device, tool, version_in_use
from tests.packaging.test_formats import altered, check, run, succeed


@pytest.fixture(scope="module")
def contents(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What all these packages hold, linked once."""
    folder = tmp_path_factory.mktemp("contents")
    return gather(Bundle.open(release.bundle(1)), HOST, folder, license="Apache-2.0")


@pytest.fixture(scope="module")
def options(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("certificates")
    certificate, key = certify(folder, "device-maker")
    return Options(key_signer(keys.private), None, certificate, key, "demo-board")


def certify(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate as updaters trust it, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    begin = datetime.datetime(2020, 1, 1)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(7).not_valid_before(begin).not_valid_after(begin.replace(year=2090))
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    files = (folder / f"{name}.pem", folder / f"{name}.key")
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return files


# What a format is made with: the program and its Debian package.
NEEDS = {
    "sysext": [("mksquashfs", "squashfs-tools"), ("veritysetup", "cryptsetup-bin")],
    "rauc": [("mksquashfs", "squashfs-tools"), ("rauc", "rauc")],
    "mender": [("mender-artifact", "mender-artifact")],
}


def write(format: str, contents: Contents, options: Options, output: Path) -> Path:
    """The package; skips where what makes it is not here."""
    for needed in NEEDS.get(format, ()):
        tool(*needed)
    output.parent.mkdir(exist_ok=True)
    FORMATS[format]([contents], output, options)
    return output


@pytest.fixture
def device(contents: Contents, keys: Keys, tmp_path: Path) -> Device:
    """A root for slm-install on this machine, which an updater calls."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for file in contents.programs:
        if file.path in ("bin/slm-install", "bin/slm-verify"):
            shutil.copy(file.source, programs / Path(file.path).name)
    return Device(tmp_path / "device", keys.public, programs, ["sh"], os.environ["PATH"])


def calling(device: Device) -> dict[str, str]:
    """The environment in which an updater's script finds slm-install of ``device``."""
    return {
        **os.environ,
        "SLM_INSTALL": f"sh {device.programs / 'slm-install'}",
        "SLM_INSTALL_OPTIONS": f"--root {device.root} --keys {device.keys}",
    }


# rauc


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


# yocto and buildroot


def lint(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("oelint_adv") is None:
        pytest.skip("no oelint-adv here; pip install oelint-adv")
    return run(sys.executable, "-m", "oelint_adv", "--quiet", *arguments)


@pytest.mark.slow
def test_oelint_finds_no_error_in_a_recipe_and_one_in_an_altered_one(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    folder = write("yocto", contents, options, tmp_path / "recipes-slm" / "slm-toy")
    recipe = folder / "slm-toy_1.1.0.bb"
    result = lint("--exit-zero", "--release", "scarthgap", recipe)
    found = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert [line for line in found if ":error:" in line] == []
    recipe.write_text(recipe.read_text().replace("LICENSE =", "LICENCE ="))
    result = lint("--exit-zero", "--release", "scarthgap", recipe)
    assert ":error:oelint.var.mandatoryvar.LICENSE:" in result.stdout + result.stderr


def test_recipes_name_the_hash_of_the_package_beside_them(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    yocto = write("yocto", contents, options, tmp_path / "y" / "slm-toy")
    text = (yocto / "slm-toy_1.1.0.bb").read_text()
    (source,) = (yocto / "files").iterdir()
    assert f'file://{source.name}"' in text
    assert hashlib.sha256(source.read_bytes()).hexdigest() in text
    with tarfile.open(source) as tar:
        folder = re.search(r'^S = "\$\{WORKDIR\}/(.*)"$', text, re.M).group(1)
        terms = tar.extractfile(f"{folder}/share/licenses.txt").read()
    assert f"md5={hashlib.md5(terms).hexdigest()}" in text
    buildroot = write("buildroot", contents, options, tmp_path / "b" / "slm-toy")
    lines = (buildroot / "slm-toy.hash").read_text().splitlines()[1:]
    assert lines[0].split() == [
        "sha256", hashlib.sha256((buildroot / source.name).read_bytes()).hexdigest(), source.name,
    ]  # fmt: skip
    assert lines[1].split()[1] == hashlib.sha256(terms).hexdigest()


def test_make_expands_a_package_of_buildroot(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    """Buildroot's own rules are in no package; what they would run is."""
    make = tool("make", "make")
    folder = write("buildroot", contents, options, tmp_path / "b" / "slm-toy")
    with tarfile.open(folder / "slm-toy-1.1.0.tar.gz") as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "Makefile").write_text(
        f"D := {source}\n@D = {source}\nTARGET_DIR := {tmp_path}/target\n"
        f"SLM_TOY_PKGDIR := {folder}\ngeneric-package =\n"
        f"include {folder}/slm-toy.mk\n"
        "install:\n\t$(SLM_TOY_INSTALL_TARGET_CMDS)\n"
        "show:\n\t@echo $(SLM_TOY_SITE)/$(SLM_TOY_SOURCE)\n"
    )
    shown = succeed(make, "-s", "-C", tmp_path, "show").strip()
    assert Path(shown).is_file()


# image


@pytest.fixture
def root_tar(tmp_path: Path) -> Path:
    """A small root file system as mmdebstrap and docker export write them."""
    for name in ("etc", "usr/bin", "opt"):
        (tmp_path / "rootfs" / name).mkdir(parents=True)
    (tmp_path / "rootfs/etc/hostname").write_text("board\n")
    (tmp_path / "rootfs/bin").symlink_to("usr/bin")
    path = tmp_path / "rootfs.tar"
    succeed("tar", "-C", tmp_path / "rootfs", "-cf", path, ".")
    return path


def test_a_model_in_a_tar_of_a_root_is_as_if_installed(
    contents: Contents, options: Options, keys: Keys, release: Release, root_tar: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    image = write("image", contents, replace(options, into=root_tar), tmp_path / "o" / "new.tar")
    root = tmp_path / "root"
    root.mkdir()
    succeed("tar", "-C", root, "-xf", image)
    assert (root / "etc/hostname").read_text() == "board\n"
    assert os.readlink(root / "bin") == "usr/bin"
    same = write("tar.gz", contents, options, tmp_path / "t" / "same.tar.gz")
    updated_by_slm_install(root / "opt/slm", root / "usr/bin", keys, release, same)


def updated_by_slm_install(
    models: Path, programs: Path, keys: Keys, release: Release, same: Path
) -> None:
    """What is in ``models`` is that of the package ``same``, takes an update and goes back."""
    assert version_in_use(models) == "1.1.0"
    check(models / "toy/current/bin/slm-selftest", models / "toy/current/bundle", keys)
    device = Device(models, keys.public, programs, ["sh"], os.environ["PATH"])
    assert "installed already" in device.succeed("install", same)
    device.succeed("install", release.tarball(2, HOST))
    device.succeed("rollback", "toy")
    assert device.version() == "1.1.0"


@pytest.fixture
def root_ext4(root_tar: Path, tmp_path: Path) -> Path:
    path = tmp_path / "rootfs.ext4"
    make_disk(path, {"etc/hostname": tmp_path / "rootfs/etc/hostname"}, 24)
    return path


def test_a_model_in_an_ext4_image_is_as_if_installed(
    contents: Contents, options: Options, keys: Keys, release: Release, root_ext4: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    image = write("image", contents, replace(options, into=root_ext4), tmp_path / "o" / "new.ext4")
    again = write("image", contents, replace(options, into=root_ext4), tmp_path / "p" / "new.ext4")
    assert image.read_bytes() == again.read_bytes()
    assert b"board" in take(image, tmp_path / "etc", "etc").joinpath("hostname").read_bytes()
    models = take(image, tmp_path / "opt", "opt") / "slm"
    programs = take(image, tmp_path / "usr", "usr") / "bin"
    assert (models / "toy/current/bin/slm-selftest").stat().st_uid == 0
    same = write("tar.gz", contents, options, tmp_path / "t" / "same.tar.gz")
    updated_by_slm_install(models, programs, keys, release, same)


def test_an_image_without_room_or_with_the_model_in_it_is_left_as_it_is(
    contents: Contents, options: Options, root_tar: Path, root_ext4: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.ext4"
    make_disk(small, {"etc/hostname": tmp_path / "rootfs/etc/hostname"}, 2)
    before = small.read_bytes()
    text = tmp_path / "text"
    text.write_text("no image" * 300)
    for into, message in (
        (small, "has room for"), (text, "neither an ext4 image nor a tar archive"),
        (tmp_path / "missing", "no such file, which is the root file system"),
        (None, "--into: must be given"),
    ):  # fmt: skip
        with pytest.raises(SlmError, match=message):
            write("image", contents, replace(options, into=into), tmp_path / "x" / "out")
    assert small.read_bytes() == before
    for number, source in enumerate((root_tar, root_ext4)):
        once = write(
            "image", contents, replace(options, into=source), tmp_path / f"{number}" / "once"
        )
        with pytest.raises(SlmError, match=r"has opt/slm/toy/.* already"):
            write("image", contents, replace(options, into=once), tmp_path / "twice" / "out")


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
