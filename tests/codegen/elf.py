"""As much of an ELF shared library as the tests look at (System V ABI; 64 bits, little endian)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NEEDED, _DT_SONAME = 1, 14
_SHN_UNDEF = 0


@dataclass(frozen=True)
class _Section:
    name: int
    type: int
    offset: int
    size: int
    link: int


class Elf:
    """A library's machine, dynamic section, exported names and section names."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        (self.machine,) = struct.unpack_from("<H", data, 18)
        (start,) = struct.unpack_from("<Q", data, 40)
        size, count, names = struct.unpack_from("<HHH", data, 58)
        self._sections = []
        for i in range(count):
            name, kind, _, _, offset, length, link = struct.unpack_from(
                "<IIQQQQI", data, start + i * size
            )
            self._sections.append(_Section(name, kind, offset, length, link))
        self._names = self._sections[names]

    @property
    def needed(self) -> list[str]:
        return self._dynamic(_DT_NEEDED)

    @property
    def soname(self) -> str:
        (name,) = self._dynamic(_DT_SONAME)
        return name

    @property
    def exports(self) -> set[str]:
        """Names of the dynamic symbols that the library defines."""
        (table,) = (s for s in self._sections if s.type == _SHT_DYNSYM)
        found = set()
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, section = struct.unpack_from("<IBBH", self._data, at)
            if section != _SHN_UNDEF:
                found.add(self._string(self._sections[table.link], name))
        return found

    def has_section(self, name: str) -> bool:
        return any(self._string(self._names, s.name) == name for s in self._sections)

    def _dynamic(self, tag: int) -> list[str]:
        (table,) = (s for s in self._sections if s.type == _SHT_DYNAMIC)
        entries = (
            struct.unpack_from("<qQ", self._data, at)
            for at in range(table.offset, table.offset + table.size, 16)
        )
        return [self._string(self._sections[table.link], value) for t, value in entries if t == tag]

    def _string(self, table: _Section, offset: int) -> str:
        start = table.offset + offset
        return self._data[start : self._data.index(b"\0", start)].decode()
