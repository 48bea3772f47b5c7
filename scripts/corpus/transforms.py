"""What is done to an exported ONNX file: a table of transforms, each with the cells it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Write = Callable[[Path, Path], None]  # from the source's file to a file in an empty folder


@dataclass(frozen=True)
class Transform:
    """``sources``: names of cells; the new cell's is the source's, a dash and ``name``."""

    name: str
    write: Write
    sources: tuple[str, ...]


TRANSFORMS: list[Transform] = []


def transform(name: str, *sources: str) -> Callable[[Write], Write]:
    """Register a function under a name, for the cells ``sources``."""

    def register(write: Write) -> Write:
        add(name, write, *sources)
        return write

    return register


def add(name: str, write: Write, *sources: str) -> None:
    """Register a transform."""
    TRANSFORMS.append(Transform(name, write, sources))
