"""Where the partitions of a disk's image are: GPT, or the four primary ones of an MBR."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from slmtvm.errors import SlmError

_SECTORS = (512, 4096)  # bytes, of disks
_MBR_MARK, _MBR_TABLE, _MBR_ENTRY, _MBR_ENTRIES = b"\x55\xaa", 446, 16, 4
_PROTECTIVE = 0xEE  # the type of what stands for a GPT
_GPT_MARK = b"EFI PART"
_GPT_HEAD = struct.Struct("<8s4s4s4s4xQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQ")
_MOST_ENTRIES, _MOST_ENTRY_BYTES = 1024, 4096


@dataclass(frozen=True)
class Partition:
    """``number`` counts from 1, as Linux numbers them; in bytes."""

    number: int
    begin: int
    size: int


def read_partitions(disk: Path) -> list[Partition]:
    """The partitions of an image, which may be none; raises SlmError where one is beyond it."""
    with disk.open("rb") as file:
        first = file.read(512)
        if len(first) < 512 or first[510:] != _MBR_MARK:
            return []
        found = []
        for number in range(_MBR_ENTRIES):
            at = _MBR_TABLE + number * _MBR_ENTRY
            kind = first[at + 4]
            begin, count = struct.unpack_from("<II", first, at + 8)
            if kind == _PROTECTIVE:
                found = _gpt(disk)
                break
            if kind and count:
                found.append(Partition(number + 1, begin * 512, count * 512))
    end = disk.stat().st_size
    for partition in found:
        if partition.begin <= 0 or partition.size <= 0 or partition.begin + partition.size > end:
            raise SlmError(
                f"partition {partition.number} ends beyond the image, which is cut or damaged",
                where=f"{disk}",
            )
    return found


def _gpt(disk: Path) -> list[Partition]:
    for sector in _SECTORS:
        with disk.open("rb") as file:
            file.seek(sector)
            head = file.read(_GPT_HEAD.size)
            if not head.startswith(_GPT_MARK) or len(head) < _GPT_HEAD.size:
                continue
            *_, table, entries, entry_bytes, _ = _GPT_HEAD.unpack(head)
            if entries > _MOST_ENTRIES or not _GPT_ENTRY.size <= entry_bytes <= _MOST_ENTRY_BYTES:
                break
            file.seek(table * sector)
            content = file.read(entries * entry_bytes)
        found = []
        for number in range(len(content) // entry_bytes):
            kind, _, begin, last = _GPT_ENTRY.unpack_from(content, number * entry_bytes)
            if any(kind):
                found.append(Partition(number + 1, begin * sector, (last - begin + 1) * sector))
        return found
    raise SlmError("its partition table (GPT) is damaged", where=f"{disk}")
