"""As much of a cubin as the tests look at: what NVIDIA's assembler says of kernels, and opcodes."""

from __future__ import annotations

import struct
from collections.abc import Iterator

# Attributes of the section .nv.info, each a symbol's index and a number, as cuobjdump names them.
_FRAME_BYTES, _STACK_BYTES, _REGISTERS = 0x11, 0x12, 0x2F
_NUMBERS = 4  # the format of such an attribute
_INSTRUCTION_BYTES = 16
# In the low 12 bits of an instruction from sm_70 on.
DP4A = 0x226  # IDP
IMMA = 0x237


class Cubin:
    """The kernels of a cubin."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        (start,) = struct.unpack_from("<Q", data, 40)
        size, count, names = struct.unpack_from("<HHH", data, 58)
        sections = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
        base = sections[names][4]
        self._sections = {self._text(base + s[0]): (s[4], s[5]) for s in sections}
        at, length = self._sections[".symtab"]
        strings, _ = self._sections[".strtab"]
        self._symbols = [
            self._text(strings + struct.unpack_from("<I", data, at + i)[0])
            for i in range(0, length, 24)
        ]

    def registers(self, kernel: str) -> int:
        """Of a thread."""
        return self._attribute(_REGISTERS, kernel)

    def local_bytes(self, kernel: str) -> int:
        """Of a thread's stack: spilled registers, arrays that are no registers."""
        return self._attribute(_FRAME_BYTES, kernel) + self._attribute(_STACK_BYTES, kernel)

    def count(self, kernel: str, opcode: int) -> int:
        """How many of a kernel's instructions have this opcode."""
        at, length = self._sections[f".text.{kernel}"]
        words = (
            struct.unpack_from("<H", self._data, at + i)[0]
            for i in range(0, length, _INSTRUCTION_BYTES)
        )
        return sum(word & 0xFFF == opcode for word in words)

    def _attribute(self, attribute: int, kernel: str) -> int:
        return next(v for a, name, v in self._numbers() if (a, name) == (attribute, kernel))

    def _numbers(self) -> Iterator[tuple[int, str, int]]:
        at, length = self._sections[".nv.info"]
        end = at + length
        while at < end:
            kind, attribute, size = struct.unpack_from("<BBH", self._data, at)
            if kind == _NUMBERS and size == 8:
                symbol, number = struct.unpack_from("<II", self._data, at + 4)
                yield attribute, self._symbols[symbol], number
            at += 4 + (size if kind == _NUMBERS else 0)

    def _text(self, at: int) -> str:
        return self._data[at : self._data.index(b"\0", at)].decode()
