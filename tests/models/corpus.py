"""The corpus's committed part: exports as people have them, unpacked when a test asks for one.

    corpus_path("llama-optimum-past")  ->  .../llama-optimum-past/model.onnx

tests/models/corpus/<family>.tar.xz holds a family's cells; scripts/make_corpus.py makes them.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from tests.models.forms import cache_base

ARCHIVES = Path(__file__).with_name("corpus")
_INDEX = ARCHIVES / "files.txt"
_SUFFIX = ".tar.xz"


def families() -> list[str]:
    """The families that there is an archive of."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in ARCHIVES.glob(f"*{_SUFFIX}"))


def family_of(cell: str) -> str:
    """The family of a cell named <family>-<route>[-<quantization>]."""
    matching = [family for family in families() if cell.startswith(f"{family}-")]
    return max(matching, key=len)


@cache
def cells() -> dict[str, tuple[str, ...]]:
    """Every cell, with the names of its ONNX files."""
    listing: dict[str, list[str]] = {}
    for line in _INDEX.read_text().split():
        cell, name = line.split("/")
        listing.setdefault(cell, []).append(name)
    return {cell: tuple(names) for cell, names in listing.items()}


def corpus_path(cell: str, name: str = "model.onnx") -> Path:
    """A file of a cell, its family's archive unpacked if need be."""
    assert name in cells().get(cell, ()), f"{cell}/{name} is not in {_INDEX}: packed without it"
    return _unpacked(family_of(cell)) / cell / name


@cache
def _unpacked(family: str) -> Path:
    """A folder with the files of a family's archive, shared by all test processes."""
    archive = ARCHIVES / f"{family}{_SUFFIX}"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    folder = cache_base() / "corpus" / f"{family}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / family
        with tarfile.open(archive) as tar:
            tar.extractall(whole, filter="data")
        try:
            whole.rename(folder)  # whole or not at all: other test processes may look for it
        except OSError:
            assert folder.exists(), folder  # another process was first
    return folder
