"""modelpack: an OCI artifact in the model format of the CNCF (ModelPack), as an archive.

Each file is a layer as it is, which registries keep once and hosts mount without unpacking;
annotations say its path and mode. https://github.com/modelpack/model-spec describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.oci_layout import EPOCH, MANIFEST_TYPE, Layout
from slmtvm.packaging.options import Options

_TYPE = "application/vnd.cncf.model"
_FILE = ord("0")  # of tar, which the format's file metadata follows
_MODALITIES = {"decoder": "text", "encoder": "embedding", "encoder-decoder": "text"}


def write_modelpack(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The archive of one artifact, with the bundle and the programs of all targets."""
    layout = Layout(output.with_name("blobs"))
    layers = [_layer(layout, file) for file in _files(several)]
    config = layout.json(_config(several[0], layers), f"{_TYPE}.config.v1+json")
    manifest = {
        "artifactType": f"{_TYPE}.manifest.v1+json",
        "config": config,
        "layers": layers,
        "annotations": {"org.slmtvm.counter": f"{several[0].counter}"},
    }
    layout.write(output, layout.json(manifest, MANIFEST_TYPE), several[0].version)


def _files(several: Sequence[Contents]) -> list[File]:
    """By their paths; programs and papers of each target lie in a folder of its name."""
    found = {}
    for contents in several:
        for file in contents.files:
            own = not file.path.startswith(("bundle/", "include/"))
            path = f"{contents.target}/{file.path}" if own else file.path
            found[path] = replace(file, path=path)
    return [found[path] for path in sorted(found)]


def _layer(layout: Layout, file: File) -> dict[str, Any]:
    facts = {
        "name": PurePosixPath(file.path).name, "mode": file.mode, "uid": 0, "gid": 0,
        "size": file.bytes, "mtime": EPOCH, "typeflag": _FILE,
    }  # fmt: skip
    return {
        **layout.blob(file.source.read_bytes(), f"{_TYPE}.{_kind(file.path)}.v1.raw"),
        "annotations": {
            "org.cncf.model.filepath": file.path,
            "org.cncf.model.file.metadata+json": json.dumps(facts, separators=(",", ":")),
            "org.cncf.model.file.mediatype.untested": "false",
        },
    }


def _kind(path: str) -> str:
    if path == "bundle/weights.bin":
        return "weight"
    if path.startswith("bundle/lib/") or "/bin/" in path or path.startswith("include/"):
        return "code"
    return "weight.config" if path.startswith("bundle/") else "doc"


def _config(contents: Contents, layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    model = contents.bundle.manifest.model
    descriptor = {"name": contents.name, "version": contents.version}
    if contents.license:
        descriptor["licenses"] = [contents.license]  # type: ignore[assignment]
    if isinstance(model.get("family"), str):
        descriptor["family"] = model["family"]
    return {
        "descriptor": descriptor,
        "config": {
            "format": "slm",
            "capabilities": {
                "inputTypes": ["text"], "outputTypes": [_MODALITIES[model["kind"]]],
            },
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }  # fmt: skip
