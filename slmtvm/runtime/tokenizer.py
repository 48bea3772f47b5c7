"""A bundle's compiled tokenizer, over the C functions that a device without Python uses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from slmtvm.runtime.interface import TextState

NO_SPECIAL = 1  # flag of slm_tokenize
KEEP_SPECIAL, TEXT_ENDS = 1, 2  # flags of slm_detokenize
MORE_TEXT = 1 << 30
_TOKENS_PER_BYTE = 4  # to begin with; a second call gets what the first one says
_TEXT_ROOM = 4096  # bytes


class TextLibrary(Protocol):
    """What runs the C functions: see ``slmtvm.runtime.interface.Library``."""

    def call(self, name: str, *arguments: object) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """Of each token: its id, its text (0 or 1), and the bytes of that text that it comes from."""

    ids: list[int]
    segments: list[int]
    spans: list[tuple[int, int]]


class CompiledTokenizer:
    """Text to tokens and back by the tables of tokenizer.bin; ``close`` it, or use ``with``."""

    def __init__(self, library: TextLibrary, bundle: Path) -> None:
        """Open ``bundle``'s tokenizer.bin; raises BundleError where it is missing or damaged."""
        self._call = library.call
        self._handle = ctypes.c_void_p()
        self._call("slm_tokenizer_open", os.fsencode(bundle), ctypes.byref(self._handle))

    def __enter__(self) -> CompiledTokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the tables; closing twice is allowed."""
        self._call("slm_tokenizer_close", self._handle)
        self._handle = ctypes.c_void_p()

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self._call("slm_token_count", self._handle)

    def encode(
        self, text: str | bytes, pair: str | bytes | None = None, *, special: bool = True
    ) -> Tokens:
        """The tokens of a text, or of two; ``special``: with those that go around texts.

        Bytes that are no UTF-8 are read as U+FFFD. Raises DeviceError where the vocabulary has no
        token for what it does not know.
        """
        texts = [t.encode() if isinstance(t, str) else t for t in (text, pair or b"")]
        total = sum(map(len, texts))
        work = np.empty(self._call("slm_tokenize_bytes", self._handle, total) // 8 + 1, np.uint64)
        room = _TOKENS_PER_BYTE * total + 16
        flags = 0 if special else NO_SPECIAL
        while True:
            ids, segments = np.empty((2, room), np.int32)
            spans = np.empty((room, 2), np.uint32)
            outputs = (spans.ctypes.data, room, work.ctypes.data, work.nbytes)
            first, tokens = (texts[0], len(texts[0])), ids.ctypes.data
            if pair is None:
                count = self._call("slm_tokenize", self._handle, *first, flags, tokens, *outputs)
                segments[:] = 0
            else:
                count = self._call(
                    "slm_tokenize_pair", self._handle, *first, texts[1], len(texts[1]), flags,
                    tokens, segments.ctypes.data, *outputs,
                )  # fmt: skip
            if count <= room:
                pairs = [(int(begin), int(end)) for begin, end in spans[:count]]
                return Tokens(ids[:count].tolist(), segments[:count].tolist(), pairs)
            room = count

    def decode(self, tokens: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of ``tokens``."""
        ids = np.fromiter(tokens, np.int32)
        flags = TEXT_ENDS | (KEEP_SPECIAL if keep_special else 0)
        return "".join(self._pieces(TextState(), ids, flags))

    def stream(self, tokens: Iterable[int], *, keep_special: bool = False) -> Iterator[str]:
        """The text of ``tokens`` piece by piece, each as soon as no token can change it."""
        flags = KEEP_SPECIAL if keep_special else 0
        state, ids = TextState(), np.empty(0, np.int32)
        for token in tokens:
            ids = np.append(ids, np.int32(token))
            yield from self._pieces(state, ids, flags)
        yield from self._pieces(state, ids, flags | TEXT_ENDS)

    def _pieces(
        self, state: TextState, ids: np.ndarray[tuple[int], np.dtype[np.int32]], flags: int
    ) -> Iterator[str]:
        buffer = ctypes.create_string_buffer(_TEXT_ROOM)
        while True:
            said = self._call(
                "slm_detokenize", self._handle, ctypes.byref(state), ids.ctypes.data, len(ids),
                flags, buffer, _TEXT_ROOM,
            )  # fmt: skip
            if size := said & ~MORE_TEXT:
                yield buffer.raw[:size].decode()
            if not said & MORE_TEXT:
                return

    def token_text(self, token: int) -> bytes:
        """The token as the vocabulary has it."""
        size = self._call("slm_token_text", self._handle, token, None, 0)
        buffer = ctypes.create_string_buffer(size + 1)
        self._call("slm_token_text", self._handle, token, buffer, size)
        return buffer.raw[:size]
