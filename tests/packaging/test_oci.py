"""Images on a base, and artifacts of models: read by skopeo and umoci, refused where altered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slmtvm.bundle import Bundle
from slmtvm.errors import SlmError
from slmtvm.packaging import Options, package
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.oci import PLATFORMS
from slmtvm.packaging.oci_layout import BaseLayout
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import DEVICES, HOST, tool
from tests.packaging.test_formats import DEBIAN, check, run, succeed
from tests.packaging.updaters import write

# What the format says of an artifact's configuration, as far as ours has it: nothing else is there.
CONFIG_SCHEMA = {
    "type": "object",
    "required": ["descriptor", "config", "modelfs"],
    "additionalProperties": False,
    "properties": {
        "descriptor": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "version": {"type": "string"},
                "family": {"type": "string"},
                "licenses": {"type": "array", "items": {"type": "string"}},
            },
        },
        "config": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "format": {"type": "string"},
                "capabilities": {
                    "type": "object",
                    "additionalProperties": False,
                    "patternProperties": {
                        "^(in|out)putTypes$": {
                            "type": "array",
                            "items": {"enum": ["text", "image", "audio", "video", "embedding"]},
                        }
                    },
                },
            },
        },
        "modelfs": {
            "type": "object",
            "required": ["type", "diffIds"],
            "additionalProperties": False,
            "properties": {
                "type": {"const": "layers"},
                "diffIds": {"type": "array", "minItems": 1, "items": {"pattern": "^sha256:"}},
            },
        },
    },
}


def arch_of(target: str) -> str:
    return {"cortex-a78": "arm64", "riscv64-rvv": "riscv64"}.get(target) or DEBIAN[
        os.uname().machine
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout that umoci made: an image of one file for this machine, one of none for arm64."""
    umoci = tool("umoci", "umoci")
    folder = tmp_path_factory.mktemp("base")
    layout = folder / "layout"
    root = folder / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/base-release").write_text("a base\n")
    succeed(umoci, "init", "--layout", layout)
    for arch in {arch_of(HOST), "arm64"}:
        image = f"{layout}:{arch}"
        succeed(umoci, "new", "--image", image)
        if arch == arch_of(HOST):
            rootless = [] if os.geteuid() == 0 else ["--rootless"]
            succeed(umoci, "insert", *rootless, "--image", image, root / "etc", "/etc")
        succeed(umoci, "config", "--image", image, "--architecture", arch, "--os", "linux",
                "--config.env", "BASE=yes", "--config.label", "org.example.base=1",
                "--config.entrypoint", "/bin/other")  # fmt: skip
    return layout


def archived(layout: Path, output: Path) -> Path:
    with tarfile.open(output, "w") as archive:
        for path in sorted(layout.rglob("*")):
            archive.add(path, path.relative_to(layout), recursive=False)
    return output


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_an_image_begins_with_its_base(
    kind: str, base: Path, contents: Contents, keys: Keys, tmp_path: Path
) -> None:
    skopeo, umoci = tool("skopeo", "skopeo"), tool("umoci", "umoci")
    given = base if kind == "folder" else archived(base, tmp_path / "base.tar")
    made = write("oci", contents, Options(base=given), tmp_path / "x" / "image.tar")
    layout = tmp_path / "out"
    succeed(skopeo, "copy", f"oci-archive:{made}", f"oci:{layout}:v")
    settings = json.loads(succeed(skopeo, "inspect", "--config", f"oci:{layout}:v"))["config"]
    assert settings["Env"][-1] == "BASE=yes" and settings["User"] == "65532:65532"
    assert settings["Entrypoint"] == ["/slm/bin/slm-serve", "/slm/bundle"]
    assert settings["Labels"]["org.example.base"] == "1"
    assert settings["Labels"]["org.opencontainers.image.title"] == "toy"
    rootless = [] if os.geteuid() == 0 else ["--rootless"]
    succeed(umoci, "unpack", *rootless, "--image", f"{layout}:v", tmp_path / "root")
    root = tmp_path / "root/rootfs"
    assert (root / "etc/base-release").read_text() == "a base\n"
    check(root / "slm/bin/slm-selftest", root / "slm/bundle", keys)


def test_a_base_that_is_damaged_or_for_other_machines_is_refused(
    base: Path, tmp_path: Path
) -> None:
    def read(given: Path, arch: str) -> None:
        layout = BaseLayout(given)
        manifest = layout.manifest(layout.image(PLATFORMS[arch]))
        layout.config(manifest)
        for layer in manifest["layers"]:
            layout.blob(layer)

    def refused(message: str, given: Path, arch: str = os.uname().machine) -> None:
        with pytest.raises(SlmError, match=message):
            read(given, arch)

    refused("holds no image for linux/riscv64, but for: linux/", base, "riscv64")
    refused("no OCI layout, which has index.json", tmp_path)
    (tmp_path / "file").write_bytes(b"none")
    refused("no OCI layout", tmp_path / "file")
    damaged = shutil.copytree(base, tmp_path / "damaged")
    largest = max((damaged / "blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    refused("damaged: the blob sha256:.* has other bytes", damaged)
    largest.unlink()
    refused("no OCI layout, which has blobs/sha256/", damaged)
    (damaged / "index.json").write_text("[]")
    refused("index.json is damaged", damaged)


def unpack_artifact(layout: Path, folder: Path) -> dict[str, Any]:
    """An artifact's files by its annotations, as what pulls it puts them; its manifest."""

    def blob(descriptor: dict[str, Any]) -> bytes:
        content = (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        assert len(content) == descriptor["size"]
        assert descriptor["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        return content

    (top,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads(blob(top))
    config = json.loads(blob(manifest["config"]))
    jsonschema.validate(config, CONFIG_SCHEMA)
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    for layer in manifest["layers"]:
        notes = layer["annotations"]
        path = folder / notes["org.cncf.model.filepath"]
        facts = json.loads(notes["org.cncf.model.file.metadata+json"])
        assert (facts["name"], facts["size"]) == (path.name, layer["size"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob(layer))
        path.chmod(facts["mode"])
    return {**manifest, "config": config}


@pytest.mark.slow
def test_an_artifact_of_the_model_format_holds_the_bundle_for_every_target(
    release: Release, keys: Keys, tmp_path: Path
) -> None:
    skopeo = tool("skopeo", "skopeo")
    made = package(release.bundle(1), "modelpack", tmp_path / "model.tar", license="Apache-2.0")
    layout = tmp_path / "layout"
    succeed(skopeo, "copy", f"oci-archive:{made}", f"oci:{layout}:v")
    raw = json.loads(succeed(skopeo, "inspect", "--raw", f"oci:{layout}:v"))
    assert raw["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert raw["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    manifest = unpack_artifact(layout, tmp_path / "root")
    assert manifest["config"]["descriptor"] == {
        "name": "toy", "version": "1.1.0", "family": "toy", "licenses": ["Apache-2.0"],
    }  # fmt: skip
    kinds = {
        layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"].split(".model.")[1]
        for layer in raw["layers"]
    }
    assert kinds["bundle/weights.bin"] == "weight.v1.raw"
    assert kinds["bundle/manifest.json"] == "weight.config.v1.raw"
    assert kinds[f"{HOST}/bin/slm-serve"] == "code.v1.raw"
    assert kinds[f"{HOST}/share/licenses.txt"] == "doc.v1.raw"
    assert set(Bundle.open(tmp_path / "root/bundle").targets) == set(DEVICES)
    for target in DEVICES:
        program = tmp_path / "root" / target / "bin/slm-selftest"
        check(program, tmp_path / "root/bundle", keys, target)


def test_an_artifact_has_equal_bytes_each_time_and_is_refused_where_altered(
    contents: Contents, release: Release, tmp_path: Path
) -> None:
    skopeo = tool("skopeo", "skopeo")
    made, again = (
        write("modelpack", contents, Options(), tmp_path / name / "model.tar") for name in "ab"
    )
    assert again.read_bytes() == made.read_bytes()
    content = bytearray(made.read_bytes())
    weights = (release.bundle(1) / "weights.bin").read_bytes()
    content[content.index(weights) + len(weights) // 2] ^= 1
    made.write_bytes(content)
    result = run(skopeo, "copy", f"oci-archive:{made}", f"oci:{tmp_path / 'out'}:v")
    assert result.returncode != 0 and "digest" in result.stderr.lower()
