"""oci: a container image as an archive of an OCI layout, one image for each architecture.

OCI image specification 1.1. The weights are a layer of their own, not compressed, the same for all
architectures: an update of the rest leaves them where they are.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.packaging.archive import gzip_stream, write_tar
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.options import Options

PLATFORMS = {
    "x86_64": {"architecture": "amd64", "os": "linux"},
    "aarch64": {"architecture": "arm64", "os": "linux", "variant": "v8"},
    "riscv64": {"architecture": "riscv64", "os": "linux"},
}
_TYPE = "application/vnd.oci.image"
_USER = "65532:65532"  # nobody in particular
_EPOCH = "1970-01-01T00:00:00Z"
_ENTRY = (
    "bin/slm-serve",
    "bin/slm-run",
    "bin/slm-selftest",
)  # what there is of these, in this order


def write_oci(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The archive, with an index over the images of ``several``, whose architectures differ.

    Raises SlmError where two are for one architecture.
    """
    arches = [contents.entry.arch for contents in several]
    if len(set(arches)) != len(arches):
        named = ", ".join(f"{c.target} ({c.entry.arch})" for c in several)
        raise SlmError(f"an image has one target an architecture, not {named}", where="--target")
    layout = _Layout(output.with_name("blobs"))
    labels = _labels(several[0])
    manifests = [_image(layout, contents, labels) for contents in several]
    index = layout.json({"manifests": manifests, "annotations": labels}, "index")
    reference = {"org.opencontainers.image.ref.name": several[0].version}
    top = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPE}.index.v1+json",
        "manifests": [{**index, "annotations": reference}],
    }
    extra = [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", _canonical(top))]
    with output.open("wb") as archive:
        write_tar(archive, layout.files(), extra)


class _Layout:
    """Blobs in a folder, by their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def blob(self, content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self._folder / digest).write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    def json(self, value: Mapping[str, Any], kind: str) -> dict[str, Any]:
        media = f"{_TYPE}.{kind}.v1+json"
        if kind != "config":
            value = {"schemaVersion": 2, "mediaType": media, **value}
        return self.blob(_canonical(value), media)

    def files(self) -> list[File]:
        return [File(f"blobs/sha256/{path.name}", path) for path in self._folder.iterdir()]


def _image(layout: _Layout, contents: Contents, labels: Mapping[str, str]) -> dict[str, Any]:
    weights = [file for file in contents.files if file.path == "bundle/weights.bin"]
    rest = [file for file in contents.files if file.path != "bundle/weights.bin"]
    layers, diffs = [], []
    for files, compress in ((weights, False), (rest, True)):
        tar = io.BytesIO()
        write_tar(tar, files, prefix="slm/")
        diffs.append(f"sha256:{hashlib.sha256(tar.getvalue()).hexdigest()}")
        kind = f"{_TYPE}.layer.v1.tar"
        if compress:
            packed = io.BytesIO()
            with gzip_stream(packed) as stream:
                stream.write(tar.getvalue())
            layers.append(layout.blob(packed.getvalue(), f"{kind}+gzip"))
        else:
            layers.append(layout.blob(tar.getvalue(), kind))
    paths = {file.path for file in contents.files}
    entry = next(path for path in _ENTRY if path in paths)
    platform = PLATFORMS[contents.entry.arch]
    history = [{"created": _EPOCH, "created_by": f"slmtvm package: {what}"}
               for what in ("weights", "programs")]  # fmt: skip
    config = layout.json(
        {
            **platform,
            "created": _EPOCH,
            "config": {
                "User": _USER,
                "Entrypoint": [f"/slm/{entry}", "/slm/bundle"],
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": history,
        },
        "config",
    )
    manifest = layout.json({"config": config, "layers": layers, "annotations": labels}, "manifest")
    return {**manifest, "platform": platform}


def _labels(contents: Contents) -> dict[str, str]:
    labels = {
        "org.opencontainers.image.title": contents.name,
        "org.opencontainers.image.version": contents.version,
        "org.slmtvm.counter": f"{contents.counter}",
    }
    if contents.license:
        labels["org.opencontainers.image.licenses"] = contents.license
    return labels


def _canonical(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
