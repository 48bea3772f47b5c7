"""SentencePiece's precompiled normalizations, made for tests: a double array, then strings."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Mapping

import numpy as np

_LEAF, _HAS_LEAF, _OFFSET_SHIFT = 1 << 31, 1 << 8, 10


def _normalized() -> dict[str, str]:
    """As nmt_nfkc: white space, controls, compatibility characters, marks behind their letters."""
    found = {"\r\n": " ", "\r": " ", "\n": " ", "\t": " ", "\x01": "", "\u200d\u0301": "x"}
    for code in (*range(0xA0, 0x250), *range(0x1E00, 0x2180), *range(0xFB00, 0xFB07), 0x3000,
                 *range(0xFF01, 0xFF60)):  # fmt: skip
        character = chr(code)
        if (text := unicodedata.normalize("NFKC", character)) != character:
            found[character] = text
        if len(apart := unicodedata.normalize("NFD", character)) > 1:
            found[apart] = text
    return found


NORMALIZED = _normalized()


def charsmap(strings: Mapping[str, str]) -> bytes:
    """The precompiled form of "what becomes what"."""
    texts, places = b"", {}
    for text in strings.values():
        if text not in places:
            places[text] = len(texts)
            texts += text.encode() + b"\0"
    units = _double_array({key.encode(): places[text] for key, text in strings.items()})
    array = np.array(units, "<u4").tobytes()
    return len(array).to_bytes(4, "little") + array + texts


def _double_array(values: dict[bytes, int]) -> list[int]:
    """Units of darts-clone: the child for a byte lies at its parent's base, xor the byte."""
    units: dict[int, int] = {0: 0}
    waiting = deque([(0, sorted(values), 0)])
    free = 1
    while waiting:
        at, keys, depth = waiting.popleft()
        branches: dict[int, list[bytes]] = {}
        for key in keys:
            branches.setdefault(key[depth] if len(key) > depth else 0, []).append(key)
        base = free
        while any(base ^ byte in units for byte in branches):
            base += 1
        while free in units:
            free += 1
        units[at] |= (base ^ at) << _OFFSET_SHIFT | (_HAS_LEAF if 0 in branches else 0)
        for byte, below in branches.items():
            units[base ^ byte] = _LEAF | values[below[0]] if byte == 0 else byte
            if byte:
                waiting.append((base ^ byte, below, depth + 1))
    return [units.get(i, 1 << 9 | _LEAF) for i in range(max(units) + 1)]
