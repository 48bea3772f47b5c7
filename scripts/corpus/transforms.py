"""What is done to an exported ONNX file: a table of transforms, each with the cells it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus.families import FAMILIES, Kind
from corpus.heads import BOTH_HALVES, HEADED, HEADS, SCORED

Write = Callable[[Path, Path], None]  # from the source's file to a file in an empty folder


@dataclass(frozen=True)
class Transform:
    """``sources``: names of cells; the new cell's is the source's, a dash and ``name``."""

    name: str
    write: Write
    sources: tuple[str, ...]


TRANSFORMS: list[Transform] = []
_PLAIN: dict[Kind, str] = {
    "decoder": "optimum-past", "encoder": "optimum", "encoder-decoder": "optimum",
}  # fmt: skip
# What optimum does not export.
_PLAIN_OF = {"lfm2-moe": "dynamo5", "mixtral": "script-past", "qwen2-moe": "script-past"}
# A cell of every family, as its usual exporter leaves it.
EVERY_FAMILY = tuple(
    f"{name}-{_PLAIN_OF.get(name, _PLAIN[family.kind])}" for name, family in FAMILIES.items()
)

# A cell of every head, as its usual exporter leaves it.
EVERY_HEAD = (
    *(
        f"{family}-{'optimum' if head.task else 'script'}-{name}"
        for name, head in HEADS.items()
        for family in (*HEADED, *(SCORED if name == "sequence" else ()))
    ),
    *(f"{family}-script-sequence" for family in BOTH_HALVES),
)


def transform(name: str, *sources: str) -> Callable[[Write], Write]:
    """Register a function under a name, for the cells ``sources``."""

    def register(write: Write) -> Write:
        add(name, write, *sources)
        return write

    return register


def add(name: str, write: Write, *sources: str) -> None:
    """Register a transform."""
    TRANSFORMS.append(Transform(name, write, sources))
