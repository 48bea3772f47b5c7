"""A package holds what it says, in equal bytes wherever it is made."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from slmtvm.bundle.signature import PublicKeys
from slmtvm.cli.package import _FORMATS
from slmtvm.errors import BundleError, SignatureError, SlmError
from slmtvm.packaging import FORMATS, package
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import DEVICES, HOST, tool

PREFIX = f"toy-1.1.0-{HOST}/"


def test_the_command_offers_every_format() -> None:
    assert tuple(FORMATS) == _FORMATS


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        files = [member for member in tar if member.isfile()]
        return {m.name: (tar.extractfile(m) or io.BytesIO()).read() for m in files}


def test_the_description_names_every_file_with_its_digest(release: Release) -> None:
    files = members(release.tarball(1, HOST))
    assert next(iter(files)) == f"{PREFIX}package"  # what is read before anything else
    lines = files[f"{PREFIX}package"].decode().splitlines()
    facts = dict(line.split(" ", 1) for line in lines if not line.startswith("file "))
    assert facts["slm-package"] == "1"
    assert (facts["name"], facts["version"], facts["counter"]) == ("toy", "1.1.0", "1")
    described = [line.split(" ") for line in lines if line.startswith("file ")]
    assert {PREFIX + path for *_, path in described} == {
        name for name in files if name not in (f"{PREFIX}package", f"{PREFIX}package.sig")
    }
    for _, mode, digest, size, path in described:
        content = files[PREFIX + path]
        assert hashlib.sha256(content).hexdigest() == digest and len(content) == int(size)
        assert mode == ("0755" if path.startswith("bin/") else "0644")
    assert int(facts["bytes"]) == sum(int(size) for *_, size, _ in described)


def test_the_bundle_in_it_is_as_it_was_but_for_other_targets(release: Release) -> None:
    files = members(release.tarball(1, HOST))
    inside = {n.removeprefix(f"{PREFIX}bundle/") for n in files if "/bundle/" in n}
    assert inside == {
        "manifest.json", "manifest.json.sig", "weights.bin", "tokenizer.json", f"lib/{HOST}.so",
    }  # fmt: skip
    for name in inside:
        assert files[f"{PREFIX}bundle/{name}"] == (release.bundle(1) / name).read_bytes()


@pytest.mark.parametrize("target", DEVICES)
def test_openssl_checks_the_signature_of_a_package(
    target: str, release: Release, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    openssl = tool("openssl", "openssl")
    shutil.unpack_archive(release.tarball(1, target), tmp_path, filter="data")
    folder = tmp_path / f"toy-1.1.0-{target}"

    def check(public: Path) -> int:
        return subprocess.run(
            [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin",
             "-in", folder / "package", "-sigfile", folder / "package.sig"],
            capture_output=True,
        ).returncode  # fmt: skip

    assert check(keys.public) == 0 and check(other_keys.public) != 0


def test_the_sbom_is_valid_and_says_what_is_inside(release: Release) -> None:
    files = members(release.tarball(1, HOST))
    text = files[f"{PREFIX}share/sbom.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    sbom = json.loads(text)
    model = sbom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == (
        "machine-learning-model", "toy", "1.1.0",
    )  # fmt: skip
    weights = hashlib.sha256((release.bundle(1) / "weights.bin").read_bytes()).hexdigest()
    assert model["hashes"] == [{"alg": "SHA-256", "content": weights}]
    parts = {part["name"] for part in sbom["components"]}
    assert {"slmtvm", "musl", "bundle/weights.bin", f"bundle/lib/{HOST}.so"} <= parts


def test_licences_go_along(release: Release, tmp_path: Path) -> None:
    path = package(
        release.bundle(1), "tar.gz", tmp_path / "x.tar.gz", target=HOST, license="CC-BY-4.0"
    )
    text = members(path)[f"{PREFIX}share/licenses.txt"].decode()
    assert text.startswith("toy: CC-BY-4.0 (the weights)\n")
    assert "Apache License" in text and "musl: MIT" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "zip"}, "'zip' must be one of"),
        ({"target": None}, "the target must be named: there are cortex-a78, riscv64-rvv"),
        ({"target": "z80"}, "the target is 'z80', which is not there"),
        ({"name": "../x"}, "must be lower-case letters"),
        ({"license": "No (Such"}, None),
    ],
)
def test_what_cannot_be_packed_is_said(
    arguments: dict[str, str | None], message: str | None, release: Release, tmp_path: Path
) -> None:
    given = {"format": "tar.gz", "target": HOST, **arguments}
    output = tmp_path / "x.tar.gz"
    if message is None:  # an expression of one's own is a name
        package(release.bundle(1), output=output, **given)  # type: ignore[arg-type]
        return
    with pytest.raises(SlmError, match=message):
        package(release.bundle(1), output=output, **given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_or_unsigned_bundle_is_not_packed(
    release: Release, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    bundle = shutil.copytree(release.bundle(1), tmp_path / "x.slm")
    with pytest.raises(SignatureError):
        package(
            bundle, "tar.gz", tmp_path / "x", target=HOST, pub=PublicKeys.read(other_keys.public)
        )
    content = (bundle / "weights.bin").read_bytes()
    (bundle / "weights.bin").write_bytes(content[:-1] + b"\x7f")
    with pytest.raises(BundleError, match="damaged or changed"):
        package(bundle, "tar.gz", tmp_path / "x", target=HOST)
    assert list(tmp_path.iterdir()) == [bundle]


def test_a_folder_that_cannot_be_written_is_an_error(release: Release, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SlmError, match="cannot be written"):
        package(release.bundle(1), "tar.gz", tmp_path / "file" / "x.tar.gz", target=HOST)
