"""The weights file: the segments of several plans, each content once, in one mapped file.

The file is a header of 64 bytes and then the segments, each at a multiple of 64 bytes. The header
(little endian) is an 8-byte magic, uint32 version, uint32 number of segments, uint64 bytes of the
whole file, uint64 content id, and zeros. ``codegen/runtime/weights.c`` reads it.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slmtvm.plan.model import Function, Plan, Ref, Segment, Space

MAGIC = b"SLMWGHT\n"
VERSION = 1
HEADER_BYTES = 64
ALIGNMENT = 64  # bytes
_WORD = 8  # bytes
_CHUNK_WORDS = 1 << 20  # keeps the temporaries of a checksum at a few times 8 MiB
_INDEX_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class WeightsFile:
    """Where each segment lies in the file, and what the file's header says."""

    segments: tuple[Segment, ...]
    size: int  # bytes, header included
    content_id: int

    def write(self, path: Path) -> str:
        """Write the file; returns its SHA-256 in hex."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in self._pieces():
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest()

    def _pieces(self) -> Iterable[bytes | memoryview]:
        header = struct.pack(
            "<8sIIQQ", MAGIC, VERSION, len(self.segments), self.size, self.content_id
        )
        yield header.ljust(HEADER_BYTES, b"\0")
        at = HEADER_BYTES
        for segment in self.segments:
            assert segment.offset == at, segment.name
            content = _bytes_of(segment.data)
            yield content.data
            at += content.nbytes
            padding = -at % ALIGNMENT
            yield bytes(padding)
            at += padding
        assert at == self.size


def merge_weights(plans: Sequence[Plan]) -> tuple[WeightsFile, list[Plan]]:
    """One file for ``plans``, and the plans with their weights at its offsets.

    Segments of equal content are stored once, in the order in which the plans name them first.
    """
    offsets: dict[tuple[int, bytes], int] = {}
    merged: list[Segment] = []
    rebased: list[Plan] = []
    at = HEADER_BYTES
    for plan in plans:
        moved: list[Segment] = []
        for segment in sorted(plan.segments, key=lambda s: s.offset):
            content = _bytes_of(segment.data)
            key = (content.nbytes, hashlib.sha256(content.data).digest())
            if key not in offsets:
                offsets[key] = at
                merged.append(replace(segment, offset=at))
                at += content.nbytes + -content.nbytes % ALIGNMENT
            moved.append(replace(segment, offset=offsets[key]))
        rebased.append(_rebase(plan, moved))
    return WeightsFile(tuple(merged), at, _content_id(merged)), rebased


def _rebase(plan: Plan, moved: list[Segment]) -> Plan:
    old = sorted(plan.segments, key=lambda s: s.offset)
    starts = [s.offset for s in old]

    def move(ref: Ref) -> Ref:
        if ref.space != Space.WEIGHTS:
            return ref
        index = bisect_right(starts, ref.offset) - 1
        inside = ref.offset - starts[index]
        if index < 0 or inside + ref.size > old[index].data.nbytes:
            raise ValueError(f"{ref} does not lie in one weight segment")
        return replace(ref, offset=moved[index].offset + inside)

    functions = tuple(
        Function(
            f.name,
            f.rows,
            tuple(replace(s, args=tuple(move(a) for a in s.args)) for s in f.steps),
        )
        for f in plan.functions
    )
    return replace(plan, functions=functions, segments=tuple(moved))


def _bytes_of(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _content_id(segments: Iterable[Segment]) -> int:
    """The checksum of everything after the header; ``checksum`` of weights.c says what it is."""
    total, index = np.uint64(0), 0
    with np.errstate(over="ignore"):
        for segment in segments:
            content = _bytes_of(segment.data)
            padded = content.nbytes + -content.nbytes % ALIGNMENT
            for start in range(0, padded, _CHUNK_WORDS * _WORD):
                piece = content[start : start + _CHUNK_WORDS * _WORD]
                count = min(_CHUNK_WORDS, (padded - start) // _WORD)
                words = np.zeros(count, "<u8")
                words.view(np.uint8)[: piece.nbytes] = piece
                steps = np.arange(index + 1, index + count + 1, dtype=np.uint64) * _INDEX_STEP
                mixed = (words ^ steps) * _MIX
                mixed ^= mixed >> np.uint64(32)
                total += mixed.sum(dtype=np.uint64)
                index += count
        return int(total * _MIX)
