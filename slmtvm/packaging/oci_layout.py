"""OCI image layouts: one is written as an archive, one is read from a folder or an archive."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.packaging.archive import write_tar
from slmtvm.packaging.file import File

TYPE = "application/vnd.oci.image"
EPOCH = "1970-01-01T00:00:00Z"
MANIFEST_TYPE, INDEX_TYPE, CONFIG_TYPE = (
    f"{TYPE}.{kind}.v1+json" for kind in ("manifest", "index", "config")
)
_OPTION = "--base"
_MOST_JSON = 4 << 20  # bytes of a manifest, as registries limit them

Descriptor = dict[str, Any]


class Layout:
    """Blobs in a folder, by their digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def blob(self, content: bytes, kind: str) -> Descriptor:
        """Store ``content``; its descriptor, of the media type ``kind``."""
        digest = hashlib.sha256(content).hexdigest()
        (self._folder / digest).write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    def json(self, value: Mapping[str, Any], kind: str) -> Descriptor:
        """Store ``value`` as JSON; manifests and indices get the fields that all of them have."""
        if kind in (MANIFEST_TYPE, INDEX_TYPE):
            value = {"schemaVersion": 2, "mediaType": kind, **value}
        return self.blob(_canonical(value), kind)

    def write(self, output: Path, top: Descriptor, name: str) -> None:
        """Write the archive ``output``, in which ``top`` is called ``name``."""
        named = {**top, "annotations": {"org.opencontainers.image.ref.name": name}}
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [named]}
        extra = [
            ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
            ("index.json", _canonical(index)),
        ]
        files = [File(f"blobs/sha256/{path.name}", path) for path in self._folder.iterdir()]
        with output.open("wb") as archive:
            write_tar(archive, files, extra)


class BaseLayout:
    """A layout that others made. What is read is compared with its digest; raises SlmError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path if path.is_dir() else None
        self._index = self._json_of(self._read("index.json"), "index.json")

    def image(self, platform: Mapping[str, str]) -> Descriptor:
        """The manifest's descriptor of the image for ``platform`` (architecture and os)."""
        wanted = (platform["os"], platform["architecture"])
        found = []
        for descriptor in self._manifests(self._index, depth=3):
            given = descriptor.get("platform")
            if given is None:  # then the image itself says it
                given = self.config(self.manifest(descriptor))
            found.append((given.get("os"), given.get("architecture")))
            if found[-1] == wanted:
                return descriptor
        there = ", ".join(sorted(f"{os}/{arch}" for os, arch in found)) or "none"
        raise SlmError(
            f"holds no image for {'/'.join(wanted)}, but for: {there}; name another base, or "
            "targets that it is for (--target)",
            where=f"{self._path}",
        )

    def manifest(self, descriptor: Descriptor) -> Descriptor:
        """The manifest that ``descriptor`` leads to."""
        return self._json_of(self.blob(descriptor), descriptor["digest"])

    def config(self, manifest: Descriptor) -> Descriptor:
        """The configuration of an image."""
        descriptor = manifest.get("config")
        if not isinstance(descriptor, dict) or descriptor.get("mediaType") != CONFIG_TYPE:
            raise SlmError("holds something else than OCI images", where=f"{self._path}")
        return self._json_of(self.blob(descriptor), descriptor["digest"])

    def blob(self, descriptor: Descriptor) -> bytes:
        """The bytes that ``descriptor`` leads to."""
        digest = descriptor.get("digest")
        kind, _, hexadecimal = digest.partition(":") if isinstance(digest, str) else ("", "", "")
        if kind != "sha256" or len(hexadecimal) != 64 or not hexadecimal.isalnum():
            raise SlmError(f"names a blob by {digest!r}, no SHA-256", where=f"{self._path}")
        content = self._read(f"blobs/sha256/{hexadecimal}")
        if hashlib.sha256(content).hexdigest() != hexadecimal:
            raise SlmError(
                f"damaged: the blob {digest} has other bytes; copy it again", where=f"{self._path}"
            )
        return content

    def _manifests(self, index: Descriptor, depth: int) -> list[Descriptor]:
        found = []
        for descriptor in index.get("manifests") or []:
            if descriptor.get("mediaType") == MANIFEST_TYPE:
                found.append(descriptor)
            elif descriptor.get("mediaType") == INDEX_TYPE and depth:
                found += self._manifests(self.manifest(descriptor), depth - 1)
        return found

    def _json_of(self, content: bytes, name: str) -> Descriptor:
        try:
            value = json.loads(content) if len(content) <= _MOST_JSON else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise SlmError(f"no OCI layout: {name} is damaged", where=f"{self._path}")
        return value

    def _read(self, name: str) -> bytes:
        try:
            if self._folder:
                return (self._folder / name).read_bytes()
            with tarfile.open(self._path) as archive:
                member = archive.extractfile(name)
                if member is None:
                    raise KeyError
                return member.read()
        except (OSError, KeyError, tarfile.TarError) as error:
            raise SlmError(
                f"no OCI layout, which has {name}: give the folder or the archive that "
                "`skopeo copy ... oci:FOLDER` or `oci-archive:FILE` writes",
                where=f"{_OPTION} {self._path}",
            ) from error


def _canonical(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
