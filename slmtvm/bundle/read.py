"""Opening a bundle: is it there, is it whole, what does it hold."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.bundle.manifest import FileEntry, Manifest, TargetEntry, parse_manifest
from slmtvm.errors import BundleError, SignatureError
from slmtvm.files import no_such_file, read_file

if TYPE_CHECKING:  # cryptography is not needed where nothing is signed
    from slmtvm.bundle.signature import PublicKeys

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
ENCRYPTED = b"SLMWENC\n"  # what encrypted weights begin with
_MAX_MANIFEST_BYTES = 16 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A folder ``x.slm`` with libraries, weights and a manifest; ``Bundle.open`` makes one."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path, keys: PublicKeys | None = None, *, least_counter: int = 0) -> Bundle:
        """The bundle at ``path``; raises BundleError where it is missing or damaged.

        Sizes are checked here, contents by ``verify`` and when the library is loaded. With
        ``keys``, the manifest must be signed by one of them and its release's counter be at least
        ``least_counter``; SignatureError where not. Libraries of some targets may be missing, as
        in a package for one of them.
        """
        path = Path(path)
        if not os.path.isdir(path):
            missing = "is a file" if os.path.exists(path) else no_such_file(path)
            raise BundleError(
                f"no bundle (a folder, as slmtvm compile writes it): {missing}", where=f"{path}"
            )
        file = path / MANIFEST
        content = read_file(file, _MAX_MANIFEST_BYTES, BundleError)
        if keys is not None:  # before anything is made of what may be anyone's
            keys.check(content, path / SIGNATURE, f"{file}")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"is not UTF-8 text: {error}", where=f"{file}") from error
        bundle = Bundle(path, parse_manifest(text, f"{file}"))
        if keys is not None:
            _check_counter(bundle.manifest.release.counter, least_counter, f"{file}")
        for entry in bundle.files():
            bundle._check_size(entry)
        return bundle

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that have a library here."""
        there = [n for n, t in self.manifest.targets.items() if self._has(t.library)]
        return tuple(there or self.manifest.targets)

    @property
    def encrypted(self) -> bool:
        """Whether a key is needed to read the weights."""
        try:
            with (self.path / self.manifest.weights.file).open("rb") as file:
                return file.read(len(ENCRYPTED)) == ENCRYPTED
        except OSError as error:
            where = f"{self.path / self.manifest.weights.file}"
            raise BundleError(f"cannot be read: {error.strerror}", where=where) from error

    def files(self) -> list[FileEntry]:
        """Every file that the manifest lists, but for targets that were left out of a package."""
        found = [self.manifest.weights]
        for name in self.targets:
            target = self.manifest.targets[name]
            found.append(target.library)
            if self._has(target.object):
                found.append(target.object)
        text = (self.manifest.tokenizer, self.manifest.tokenizer_tables, self.manifest.chat)
        return found + [entry for entry in text if entry is not None]

    def object(self, target: str) -> Path:
        """The kernels and tables of ``target``, to be linked into a program; raises BundleError
        where they are not there or were changed."""
        entry = self._target(target).object
        if not self._has(entry):
            raise BundleError(
                "missing: this bundle was taken out of a package, and no programs can be linked of "
                "it; use the one that slmtvm compile wrote",
                where=f"{self.path / entry.file}",
            )
        return self.check_file(entry)

    def library(self, target: str) -> Path:
        """The library of ``target``; raises BundleError where there is none or it was changed."""
        return self.check_file(self._target(target).library)

    def _target(self, name: str) -> TargetEntry:
        entry = self.manifest.targets.get(name)
        if entry is None or name not in self.targets:
            raise BundleError(
                f"no library for target {name!r}; there are {', '.join(self.targets)}",
                where=f"{self.path}",
            )
        return entry

    def _has(self, entry: FileEntry) -> bool:
        return os.path.lexists(self.path / entry.file)

    def tokenizer(self) -> Path:
        """The tokenizer's file; raises BundleError where the bundle has none or it was changed."""
        if self.manifest.tokenizer is None:
            raise BundleError(
                "this bundle has no tokenizer.json: use token ids, or compile with a tokenizer",
                where=f"{self.path}",
            )
        return self.check_file(self.manifest.tokenizer)

    def tokenizer_tables(self) -> Path:
        """The compiled tokenizer; raises BundleError where there is none or it was changed."""
        if self.manifest.tokenizer_tables is None:
            raise BundleError(
                "this bundle has no compiled tokenizer: it has none at all, or one that cannot be "
                "compiled, as slmtvm compile said",
                where=f"{self.path}",
            )
        return self.check_file(self.manifest.tokenizer_tables)

    def verify(self) -> None:
        """Compare each file's SHA-256 with the manifest; raises BundleError at the first damage."""
        for entry in self.files():
            self.check_file(entry)

    def check_file(self, entry: FileEntry) -> Path:
        """The path of ``entry`` after comparing its contents with the manifest."""
        path = self._check_size(entry)
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise BundleError(f"cannot be read: {error.strerror}", where=f"{path}") from error
        if digest.hexdigest() != entry.sha256:
            raise BundleError(
                f"damaged or changed: SHA-256 {digest.hexdigest()}, the manifest says "
                f"{entry.sha256}; copy the bundle again",
                where=f"{path}",
            )
        return path

    def _check_size(self, entry: FileEntry) -> Path:
        path = self.path / entry.file
        if not path.is_file():
            raise BundleError("missing from the bundle; copy it again", where=f"{path}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{size} bytes, the manifest says {entry.bytes}; copy the bundle again",
                where=f"{path}",
            )
        return path


def _check_counter(counter: int, least: int, where: str) -> None:
    if counter < least:
        raise SignatureError(
            f"the counter of this release is {counter}, older than the least that is taken, "
            f"{least}",
            where=where,
        )
