"""The file of a constraint: what codegen/runtime/constraint.c reads.

Words of 32 bits, little-endian: a head (magic, version, how many words, tokens, classes, tokens
in classes, states, transitions, ends; SHA-256 of what was compiled and of the tokenizer.json); the
class of each token, 16 bits; where each class begins in the list of tokens that follows; where
each state's row begins in the transitions, which follow; the tokens until a text is whole, by
state; the tokens that end it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slmtvm.text.constraint.token_tables import TokenTables

_MAGIC = b"SLMCONS\0"
_VERSION = 1
_DIGEST_BYTES = 32


def constraint_file(
    tables: TokenTables, ends: Sequence[int], vocab_size: int, source: bytes, tokenizer: bytes
) -> bytes:
    """The file's bytes. ``source`` and ``tokenizer`` are SHA-256 digests; equal input gives equal
    bytes."""
    assert len(source) == len(tokenizer) == _DIGEST_BYTES
    classes = np.zeros(vocab_size + vocab_size % 2, np.uint16)
    classes[: len(tables.class_of)] = tables.class_of
    order = np.argsort(tables.class_of, kind="stable")
    listed = order[tables.class_of[order] > 0]
    counts = np.bincount(tables.class_of[listed], minlength=tables.class_count)
    row_sizes = [len(row) for row in tables.rows]
    transitions = np.concatenate(tables.rows) if sum(row_sizes) else np.empty((0, 2), np.int64)
    body = [
        classes.view("<u2").tobytes(),
        *map(_words, (
            _begins(counts), listed, _begins(row_sizes), transitions.reshape(-1), tables.left,
            np.array(ends, np.int64),
        )),
    ]  # fmt: skip
    head_words = (len(_MAGIC) + 2 * _DIGEST_BYTES) // 4 + 8
    sizes = [
        _VERSION, head_words + sum(map(len, body)) // 4, vocab_size, tables.class_count,
        len(listed), len(tables.rows), len(transitions), len(ends),
    ]  # fmt: skip
    head = [_MAGIC, _words(np.array(sizes, np.int64)), source, tokenizer]
    return b"".join([*head, *body])


def _words(values: npt.NDArray[np.int64]) -> bytes:
    return values.astype("<u4").tobytes()


def _begins(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
