"""Signing a bundle: its release is set, and the signature of the manifest put beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmtvm.bundle.build_folder import build_folder
from slmtvm.bundle.manifest import Release, check_version
from slmtvm.bundle.move import move_into_place
from slmtvm.bundle.read import MANIFEST, SIGNATURE, Bundle
from slmtvm.bundle.signature import PublicKeys, Signer
from slmtvm.errors import BundleError, SlmError


def sign_bundle(
    path: str | Path,
    signer: Signer,
    *,
    counter: int | None = None,
    version: str | None = None,
    speed: Mapping[str, Any] | None = None,
    pub: PublicKeys | None = None,
) -> Bundle:
    """Sign the bundle ``path`` after comparing all its files with its manifest.

    ``counter`` and ``version`` become its release where they are given, ``speed`` the manifest's
    ``extra["bench"]`` (``slmtvm.bundle.speed`` reads it). ``pub``: keys one of which
    must accept the signature, against a signer that uses another one. The signed bundle takes the
    place of the unsigned one in one step. Raises BundleError where the bundle is damaged or cannot
    be written, SlmError where the signer fails, SignatureError where ``pub`` refuses it.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    release = bundle.manifest.release
    check_version(version or "", f"{path}")
    release = Release(
        release.counter if counter is None else counter,
        release.version if version is None else version,
    )
    extra = bundle.manifest.extra if speed is None else {**bundle.manifest.extra, "bench": speed}
    manifest = replace(bundle.manifest, release=release, extra=extra)
    content = manifest.to_json().encode()
    signature = signer(content)
    try:
        with build_folder(bundle.path) as folder:
            _link(bundle.path, folder)
            _write(folder / MANIFEST, content)
            _write(folder / SIGNATURE, signature)
            folder.chmod(0o755)
            if pub is not None:
                Bundle.open(folder, pub)
            move_into_place(folder, bundle.path)
    except OSError as error:
        raise BundleError(f"cannot be signed: {error.strerror}", where=f"{path}") from error
    return Bundle(bundle.path, manifest)


def verify_signature(path: str | Path, pub: PublicKeys, *, least_counter: int = 0) -> Bundle:
    """The bundle ``path``, where it is signed by one of ``pub`` and every file is what was signed.

    Raises SignatureError where it is not signed so or its counter is below ``least_counter``,
    BundleError where a file is damaged.
    """
    bundle = Bundle.open(path, pub, least_counter=least_counter)
    bundle.verify()
    listed = {entry.file for entry in bundle.files()} | {MANIFEST, SIGNATURE}
    listed |= {t.library.file for t in bundle.manifest.targets.values()}
    listed |= {t.object.file for t in bundle.manifest.targets.values()}
    for item in sorted(bundle.path.rglob("*")):
        name = item.relative_to(bundle.path).as_posix()
        if name not in listed and (item.is_symlink() or not item.is_dir()):
            raise BundleError("is no part of the signed bundle: remove it", where=f"{item}")
    return bundle


def check_accuracy(bundle: Bundle, requirement: str) -> None:
    """Raise BundleError unless the check's figures meet ``requirement``, such as ``kl<0.01``.

    Figures are those of the manifest's ``extra.check``: ``kl`` and ``relative`` (below), ``cosine``
    (above). A bundle that was not checked meets none.
    """
    for sign in ("<", ">"):
        name, found, text = requirement.partition(sign)
        if found:
            break
    try:
        bound = float(text)
    except ValueError:
        found = ""
    if not found or not name.strip():
        raise SlmError(
            f"{requirement!r} is no requirement; write one as kl<0.01, relative<0.1 or cosine>0.99",
            where="--require",
        )
    record = bundle.manifest.extra.get("check", {})
    value = record.get(name.strip()) if isinstance(record, dict) else None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        there = ", ".join(k for k, v in record.items() if isinstance(v, float)) or "none"
        raise BundleError(
            f"its record of accuracy has no figure {name.strip()!r} (there are: {there}), and so "
            f"does not meet {requirement}",
            where=f"{bundle.path}",
        )
    if not (value < bound if sign == "<" else value > bound):
        raise BundleError(
            f"its {name.strip()} is {value}, which does not meet {requirement}",
            where=f"{bundle.path}",
        )


def _link(source: Path, folder: Path) -> None:
    """The files of ``source`` in ``folder`` too, without copying them where that can be."""
    for item in sorted(source.rglob("*")):
        place = folder / item.relative_to(source)
        if item.is_dir():
            place.mkdir()
            place.chmod(item.stat().st_mode & 0o777)
        elif item.name not in (MANIFEST, SIGNATURE) or item.parent != source:
            try:
                os.link(item, place)
            except OSError:  # a file system without links, or somebody else's file
                shutil.copy2(item, place)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)
