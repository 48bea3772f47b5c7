"""oci: a container image as an archive of an OCI layout, one image for each architecture.

OCI image specification 1.1. The weights are a layer of their own, not compressed, the same for all
architectures: an update of the rest leaves them where they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.packaging.archive import gzip_stream, write_tar
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.oci_layout import (
    CONFIG_TYPE,
    EPOCH,
    INDEX_TYPE,
    MANIFEST_TYPE,
    TYPE,
    BaseLayout,
    Layout,
)
from slmtvm.packaging.options import Options

PLATFORMS = {
    "x86_64": {"architecture": "amd64", "os": "linux"},
    "aarch64": {"architecture": "arm64", "os": "linux", "variant": "v8"},
    "riscv64": {"architecture": "riscv64", "os": "linux"},
}
_USER = "65532:65532"  # nobody in particular
_ENTRY = (
    "bin/slm-serve",
    "bin/slm-run",
    "bin/slm-selftest",
)  # what there is of these, in this order
# Of a base's configuration: what an image goes on with.
_KEPT = ("Env", "Volumes", "WorkingDir", "Labels", "StopSignal")


def write_oci(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The archive, with an index over the images of ``several``, whose architectures differ.

    They begin with the layers of ``options.base``, where there is one. Raises SlmError where two
    are for one architecture, or the base is damaged or has no image for one.
    """
    arches = [contents.entry.arch for contents in several]
    if len(set(arches)) != len(arches):
        named = ", ".join(f"{c.target} ({c.entry.arch})" for c in several)
        raise SlmError(f"an image has one target an architecture, not {named}", where="--target")
    layout = Layout(output.with_name("blobs"))
    base = BaseLayout(options.base) if options.base else None
    labels = _labels(several[0])
    manifests = [_image(layout, contents, labels, base) for contents in several]
    index = layout.json({"manifests": manifests, "annotations": labels}, INDEX_TYPE)
    layout.write(output, index, several[0].version)


def _image(
    layout: Layout, contents: Contents, labels: Mapping[str, str], base: BaseLayout | None
) -> dict[str, Any]:
    weights = [file for file in contents.files if file.path == "bundle/weights.bin"]
    rest = [file for file in contents.files if file.path != "bundle/weights.bin"]
    platform = PLATFORMS[contents.entry.arch]
    below = _Below(layout, base, platform) if base else None
    layers = below.layers if below else []
    diffs, history = (below.diffs, below.history) if below else ([], [])
    for files, compress, what in ((weights, False, "weights"), (rest, True, "programs")):
        tar = io.BytesIO()
        write_tar(tar, files, prefix="slm/")
        diffs.append(f"sha256:{hashlib.sha256(tar.getvalue()).hexdigest()}")
        history.append({"created": EPOCH, "created_by": f"slmtvm package: {what}"})
        kind = f"{TYPE}.layer.v1.tar"
        if compress:
            packed = io.BytesIO()
            with gzip_stream(packed) as stream:
                stream.write(tar.getvalue())
            layers.append(layout.blob(packed.getvalue(), f"{kind}+gzip"))
        else:
            layers.append(layout.blob(tar.getvalue(), kind))
    paths = {file.path for file in contents.files}
    entry = next(path for path in _ENTRY if path in paths)
    settings = below.settings if below else {}
    config = layout.json(
        {
            **platform,
            "created": EPOCH,
            "config": {
                "WorkingDir": "/",
                **settings,
                "User": _USER,
                "Entrypoint": [f"/slm/{entry}", "/slm/bundle"],
                "Labels": {**settings.get("Labels", {}), **labels},
            },
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": history,
        },
        CONFIG_TYPE,
    )
    annotations = {**labels, **(below.annotations if below else {})}
    manifest = layout.json(
        {"config": config, "layers": layers, "annotations": annotations}, MANIFEST_TYPE
    )
    return {**manifest, "platform": platform}


class _Below:
    """What an image takes over from its base, whose layers are put into ``layout``."""

    def __init__(self, layout: Layout, base: BaseLayout, platform: Mapping[str, str]) -> None:
        descriptor = base.image(platform)
        manifest = base.manifest(descriptor)
        config = base.config(manifest)
        try:
            self.layers = [
                layout.blob(base.blob(layer), layer["mediaType"]) for layer in manifest["layers"]
            ]
            self.diffs: list[str] = list(config["rootfs"]["diff_ids"])
            self.history: list[dict[str, Any]] = list(config.get("history") or [])
            given = config.get("config") or {}
            self.settings = {name: given[name] for name in _KEPT if given.get(name)}
        except (KeyError, TypeError, AttributeError) as error:
            raise SlmError(
                f"no image: {descriptor['digest']} is damaged", where="--base"
            ) from error
        self.annotations = {"org.opencontainers.image.base.digest": descriptor["digest"]}


def _labels(contents: Contents) -> dict[str, str]:
    labels = {
        "org.opencontainers.image.title": contents.name,
        "org.opencontainers.image.version": contents.version,
        "org.slmtvm.counter": f"{contents.counter}",
    }
    if contents.license:
        labels["org.opencontainers.image.licenses"] = contents.license
    return labels
