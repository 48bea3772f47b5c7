"""A bundle on a device as what verification evaluates: rows that were computed there."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from slmtvm.rpc.device_bundle import DeviceBundle

_EVAL, _ENCODE, _OUTPUTS = range(3)  # of device_eval.c, as are the flags
_HAS_MASK, _HAS_SOURCE_MASK, _HAS_SEGMENTS = 1, 2, 4
_MOST_ROWS_BYTES = 32 << 20  # of an answer

Array = np.ndarray


class DeviceSession:
    """An ``Evaluator`` whose calls are each a process on the device.

    Contexts live here: a call evaluates what came before it again.
    """

    def __init__(self, bundle: DeviceBundle, threads: int = 1) -> None:
        self._bundle, self._threads = bundle, threads
        self._tokens = np.zeros(0, np.int32)
        self._mask = np.zeros(0, np.uint8)
        self._source: tuple[Array, Array | None] | None = None

    @property
    def info(self) -> dict[str, Any]:
        """What the library holds, as ``Session.info``."""
        return self._bundle.info

    def reset(self) -> None:
        """Forget all tokens; a source stays."""
        self._tokens, self._mask = self._tokens[:0], self._mask[:0]

    def eval_all(self, tokens: Array, mask: Array | None = None) -> Array:
        """Append ``tokens`` (n,); logits float32 (n, vocab) after each."""
        first = len(self._append(tokens, mask)) - len(tokens)
        width = int(self.info["output_size"])
        step = max(_MOST_ROWS_BYTES // (4 * width), 1)
        total = len(self._tokens)
        return np.concatenate(
            [
                self._context(_EVAL, at, min(at + step, total)).reshape(-1, width)
                for at in range(first, total, step)
            ]
        )

    def encode(self, tokens: Array, mask: Array | None = None) -> Array:
        """The first output of an encoder; of an encoder-decoder's source hidden states."""
        flat = self._ask(_ENCODE, tokens, mask)
        if self.info["kind"] != "encoder":
            self._source = (tokens, mask)
            self.reset()
            return flat.reshape(len(tokens), -1)
        return flat if self.info["outputs"][0]["pooled"] else flat.reshape(len(tokens), -1)

    def outputs(
        self, tokens: Array, mask: Array | None = None, segments: Array | None = None
    ) -> dict[str, Array]:
        """All outputs by name, as ``Session.outputs``."""
        encoder = self.info["kind"] == "encoder"
        if encoder:
            flat = self._ask(_OUTPUTS, tokens, mask, segments)
        else:
            total = len(self._append(tokens, mask))
            flat = self._context(_OUTPUTS, 0, total)
        found, at = {}, 0
        for output in self.info["outputs"]:
            rows = encoder and not output["pooled"]
            shape = (len(tokens), output["features"]) if rows else (output["features"],)
            found[output["name"]] = flat[at : at + math.prod(shape)].reshape(shape)
            at += math.prod(shape)
        return found

    def _append(self, tokens: Array, mask: Array | None) -> Array:
        visible = np.ones(len(tokens), np.uint8) if mask is None else np.asarray(mask) != 0
        self._tokens = np.concatenate([self._tokens, tokens]).astype(np.int32)
        self._mask = np.concatenate([self._mask, visible]).astype(np.uint8)
        return self._tokens

    def _context(self, operation: int, first: int, end: int) -> Array:
        mask = self._mask[:end]
        return self._ask(operation, self._tokens[:end], None if mask.all() else mask, first=first)

    def _ask(
        self,
        operation: int,
        tokens: Array,
        mask: Array | None = None,
        segments: Array | None = None,
        first: int = 0,
    ) -> Array:
        source, source_mask = (None, None) if operation == _ENCODE else self._source or (None, None)
        flags = (
            (mask is not None) * _HAS_MASK
            | (source_mask is not None) * _HAS_SOURCE_MASK
            | (segments is not None) * _HAS_SEGMENTS
        )
        count = 0 if source is None else len(source)
        parts = [struct.pack("<5i", operation, flags, len(tokens), first, count)]
        for values, dtype in (
            (source, "<i4"), (source_mask, "u1"), (tokens, "<i4"), (mask, "u1"), (segments, "<i4"),
        ):  # fmt: skip
            if values is not None:
                kept = np.asarray(values) != 0 if dtype == "u1" else np.asarray(values)
                parts.append(kept.astype(dtype).tobytes())
        raw = self._bundle.run("eval", str(self._threads), stdin=b"".join(parts))
        return np.frombuffer(raw, "<f4")
