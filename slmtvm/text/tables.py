"""The file tokenizer.bin: what the C runtime follows to turn text into tokens and back.

Words of 32 bits, little-endian; codegen/runtime/text_open.c reads them. A reference is the number
of the word that a table starts at, 0 where there is none. The header is a word for each field of
``Header``; what tables hold is said where they are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from slmtvm.text.automaton import Automaton

VERSION = 1
NONE = 0xFFFFFFFF
CODE_POINTS = 0x110000
_MAGIC = b"SLMTEXT\n"
_PAGE = 128  # code points of a page of a character map
_HASH = np.uint64(0x9E3779B97F4A7C15)
_LEAST_SLOTS_LOG = 2

Words = npt.NDArray[np.uint32]


@dataclass
class Header:
    """After the magic bytes, the version and the number of words in the file."""

    tokens: int = 0
    unknown: int = NONE
    model: int = 0
    flags: int = 0
    kinds: int = 0
    step_count: int = 0
    steps: int = 0
    trie: int = 0
    inner_root: int = 0
    longest_word: int = 0
    symbols: int = 0
    initial: int = 0
    merges: int = 0
    fallback: int = 0
    scores: int = 0
    first_texts: int = 0
    texts: int = 0
    names: int = 0
    token_flags: int = 0
    trims: int = 0
    single: int = 0
    single_count: int = 0
    pair: int = 0
    pair_count: int = 0
    stripped: int = 0
    stripped_count: int = 0
    known_hashes: int = 0
    known: int = 0
    pages: int = 0
    page_count: int = 0


_HEADER_WORDS = 4 + len(astuple(Header()))


class TableWriter:
    """Tables one after the other; equal ones are written once. Each method returns a reference."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._next = _HEADER_WORDS
        self._known: dict[bytes, int] = {}
        self._pages: dict[bytes, int] = {}

    def words(self, values: Iterable[int] | npt.NDArray[np.unsignedinteger]) -> int:
        """Numbers below 2**32."""
        array = values if isinstance(values, np.ndarray) else np.fromiter(values, np.uint64)
        return self._add(array.astype("<u4").tobytes())

    def doubles(self, values: Sequence[float]) -> int:
        """float64, two words each."""
        return self._add(np.asarray(values, "<f8").tobytes())

    def pairs(self, entries: dict[tuple[int, int], tuple[int, int]]) -> int:
        """A hash table of pairs to pairs, of which no first key is NONE.

        The logarithm of the number of slots, and four words for each slot: keys, values. A pair
        lies in the first free slot from the one that its hash says.
        """
        count = len(entries)
        log = max(_LEAST_SLOTS_LOG, int(count * 3 // 2).bit_length())
        slots = np.full((1 << log, 4), NONE, np.uint32)
        if entries:
            keys = np.array(list(entries), np.uint64)
            values = np.array(list(entries.values()), np.uint64)
            with np.errstate(over="ignore"):
                hashes = (keys[:, 0] << np.uint64(32) | keys[:, 1]) * _HASH
            self._place(slots, keys, values, (hashes >> np.uint64(64 - log)).astype(np.int64))
        return self._add(np.uint32(log).tobytes() + slots.astype("<u4").tobytes())

    @staticmethod
    def _place(
        slots: Words,
        keys: npt.NDArray[np.uint64],
        values: npt.NDArray[np.uint64],
        wanted: npt.NDArray[np.int64],
    ) -> None:
        """All that want a free slot at once: the first gets it, the others want the next one."""
        free = np.ones(len(slots), bool)
        left = np.arange(len(keys))
        while len(left):
            places = wanted[left]
            _, first = np.unique(places, return_index=True)
            got = np.zeros(len(left), bool)
            got[first] = free[places[first]]
            taken = left[got]
            slots[wanted[taken], :2] = keys[taken]
            slots[wanted[taken], 2:] = values[taken]
            free[wanted[taken]] = False
            left = left[~got]
            wanted[left] = (wanted[left] + 1) % len(slots)

    def char_map(self, values: npt.NDArray[np.uint16]) -> int:
        """A number for each code point: pages of 128, shared by all maps of the file."""
        pages = values.astype("<u2").reshape(-1, _PAGE)
        numbers = [self._pages.setdefault(p.tobytes(), len(self._pages)) for p in pages]
        return self._add(np.array(numbers, "<u2").tobytes())

    def strings(self, values: Sequence[bytes]) -> int:
        """Their number, where each ends, and their bytes."""
        ends = np.cumsum([0, *map(len, values)]).astype("<u4")
        return self._add(np.uint32(len(values)).tobytes() + ends.tobytes() + b"".join(values))

    def automaton(self, automaton: Automaton) -> int:
        """Its classes of characters, its size, its starts, and 16 bits for each transition."""
        states, classes = automaton.next.shape
        head = [
            self.char_map(automaton.classes), states, classes,
            automaton.first_start, automaton.start,
        ]  # fmt: skip
        tables = (automaton.next, automaton.accepts, automaton.at_end)
        body = b"".join(_padded(t.astype("<u2").tobytes()) for t in tables)
        return self._add(np.array(head, "<u4").tobytes() + body)

    def finish(self, header: Header) -> bytes:
        """The whole file."""
        pages = b"".join(self._pages)
        header.page_count = len(self._pages)
        header.pages = self._add(pages)
        head = [VERSION, self._next, *astuple(header)]
        return b"".join([_MAGIC, np.array(head, "<u4").tobytes(), *self._parts])

    def _add(self, content: bytes) -> int:
        content = _padded(content)
        if (known := self._known.get(content)) is not None:
            return known
        at = self._next
        self._known[content] = at
        self._parts.append(content)
        self._next += len(content) // 4
        return at


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)
