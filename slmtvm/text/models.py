"""The model of a tokenizer.json, which takes words apart into tokens, as tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.steps import trie
from slmtvm.text.tables import NONE, Header, TableWriter

Settings = dict[str, Any]
_UNKNOWN_PENALTY = 10.0  # what an unknown character costs beside Unigram's least likely token
_LONGEST_KNOWN = 32  # SHORT_WORD of codegen/runtime/text_bpe.c
_HASH_FACTOR = 0x9E3779B97F4A7C15
_NO_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
_BARE: dict[str, object] = {"version": "1.0", "added_tokens": [], **dict.fromkeys(_NO_PARTS)}


class Model(IntEnum):
    BPE = 1
    WORDPIECE = 2
    UNIGRAM = 3
    WORDLEVEL = 4


class Flag(IntFlag):
    """SLM_TEXT_ of codegen/runtime/text.h."""

    BYTES = 1
    WHOLE_WORDS = 2
    FUSE_UNKNOWN = 4
    BYTE_FALLBACK = 8
    AFFIXES = 16
    TRIM = 32
    TRIM_PREFIXED = 64


@cache
def byte_characters() -> dict[str, int]:
    """The characters that stand for bytes (github.com/openai/gpt-2, encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + n): b for n, b in enumerate(others)}}


def byte_text(text: str) -> bytes | None:
    """The bytes that characters stand for; None where one of them stands for none."""
    table = byte_characters()
    found = [table.get(c, -1) for c in text]
    return None if -1 in found else bytes(found)


def vocabulary(model: Settings) -> dict[str, int]:
    """The tokens of the field "model", by name."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {piece[0]: id_ for id_, piece in enumerate(vocab)}
    return dict(vocab)


def write_model(
    model: Settings, in_bytes: bool, token_count: int, header: Header, writer: TableWriter
) -> None:
    """Its tables, and its fields of ``header``; UnsupportedTokenizerError where not compiled."""
    kind = model.get("type")
    if kind not in _KINDS:
        raise UnsupportedTokenizerError(f"the model {kind} is not compiled")
    header.flags |= Flag.BYTES if in_bytes else 0
    _KINDS[str(kind)](model, in_bytes, token_count, header, writer)


def _encoded(text: str, in_bytes: bool) -> bytes | None:
    """A token as the model meets it in a word; None where it never does."""
    return byte_text(text) if in_bytes else text.encode()


def _whole_trie(vocab: dict[str, int], in_bytes: bool) -> list[tuple[bytes, int]]:
    pairs = ((_encoded(text, in_bytes), id_) for text, id_ in vocab.items())
    return [(text, id_) for text, id_ in pairs if text]


def _fallback(vocab: dict[str, int], writer: TableWriter) -> int:
    return writer.words([vocab.get(f"<0x{byte:02X}>", NONE) for byte in range(256)])


def _unknown(vocab: dict[str, int], model: Settings) -> int:
    said = model.get("unk_token")
    return NONE if said is None else vocab.get(said, NONE)


def _bpe(
    model: Settings, in_bytes: bool, token_count: int, header: Header, writer: TableWriter
) -> None:
    if model.get("dropout"):
        raise UnsupportedTokenizerError("BPE with dropout is random, which is not compiled")
    vocab = vocabulary(model)
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    flags = Flag(0)
    if prefix or suffix:
        flags |= Flag.AFFIXES
    if model.get("fuse_unk"):
        flags |= Flag.FUSE_UNKNOWN
    if model.get("byte_fallback"):
        if prefix or suffix:
            raise UnsupportedTokenizerError("BPE with byte fallback and affixes is not compiled")
        flags |= Flag.BYTE_FALLBACK
        header.fallback = _fallback(vocab, writer)
    if model.get("ignore_merges"):
        flags |= Flag.WHOLE_WORDS
    header.model = Model.BPE
    header.flags |= flags
    header.unknown = _unknown(vocab, model)
    whole = _whole_trie(vocab, in_bytes) if Flag.WHOLE_WORDS in flags else []
    header.trie = writer.pairs(trie(whole))
    symbols = _symbols(vocab, in_bytes, prefix, suffix)
    header.symbols = writer.pairs({key: (id_, 0) for key, id_ in symbols.items()})
    header.initial = writer.words([symbols.get((c, 0), NONE) for c in range(256)])
    header.merges = writer.pairs(_merges(model, vocab, prefix))
    affixed = bool(prefix or suffix)
    _write_known({} if affixed else _known_words(model, vocab, in_bytes), header, writer)


def _known_words(model: Settings, vocab: dict[str, int], in_bytes: bool) -> dict[bytes, int]:
    """Words of 2 to 32 bytes that the model makes one token of: found without merging anything."""
    from tokenizers import Tokenizer

    tokenize = Tokenizer.from_str(json.dumps({**_BARE, "model": model})).model.tokenize
    found = {}
    for text, id_ in vocab.items():
        word = _encoded(text, in_bytes)
        if word and 1 < len(word) <= _LONGEST_KNOWN:
            tokens = tokenize(text)
            if len(tokens) == 1 and tokens[0].id == id_:
                found[word] = id_
    return found


def _hash(word: bytes) -> tuple[int, int]:
    """64 bits in two halves; codegen/runtime/text_bpe.c computes the same."""
    total = len(word)
    for at in range(0, len(word), 8):
        total = (total ^ int.from_bytes(word[at : at + 8], "little")) * _HASH_FACTOR % 2**64
        total ^= total >> 32
    return total >> 32, total % 2**32


def _write_known(words: dict[bytes, int], header: Header, writer: TableWriter) -> None:
    hashes: dict[tuple[int, int], tuple[int, int]] = {}
    for number, (word, id_) in enumerate(words.items()):
        key = _hash(word)
        if key[0] != NONE:
            hashes.setdefault(key, (id_, number))
    header.known_hashes = writer.pairs(hashes)
    header.known = writer.strings([*words, b""])


def _symbols(
    vocab: dict[str, int], in_bytes: bool, prefix: str, suffix: str
) -> dict[tuple[int, int], int]:
    """(character, place) to tokens; places: 1 inside a word, 2 at its end, 3 both, 0 neither."""
    found: dict[tuple[int, int], int] = {}
    places = [(p, prefix if p & 1 else "", suffix if p & 2 else "") for p in range(4)]
    if not prefix and not suffix:
        places = places[:1]
    for text, id_ in vocab.items():
        for place, before, after in places:
            if not (text.startswith(before) and text.endswith(after)):
                continue
            inner = text[len(before) : len(text) - len(after)]
            if len(inner) != 1:
                continue
            character = byte_characters().get(inner) if in_bytes else ord(inner)
            if character is not None:
                found[character, place] = id_
    return found


def _merges(
    model: Settings, vocab: dict[str, int], prefix: str
) -> dict[tuple[int, int], tuple[int, int]]:
    """(token, token) to (rank, token)."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        found[vocab[first], vocab[second]] = (rank, vocab[first + second[len(prefix) :]])
    return found


def _wordpiece(
    model: Settings, in_bytes: bool, token_count: int, header: Header, writer: TableWriter
) -> None:
    vocab = vocabulary(model)
    prefix = model["continuing_subword_prefix"]
    header.model = Model.WORDPIECE
    header.unknown = _unknown(vocab, model)
    header.longest_word = model["max_input_chars_per_word"]
    inner = {t[len(prefix) :]: id_ for t, id_ in vocab.items() if t.startswith(prefix)}
    edges = trie(_whole_trie(vocab, in_bytes))
    header.inner_root = 2 * sum(len(text.encode()) for text in vocab) + 1  # no other node's
    header.trie = writer.pairs(trie(_whole_trie(inner, in_bytes), edges, root=header.inner_root))


def _wordlevel(
    model: Settings, in_bytes: bool, token_count: int, header: Header, writer: TableWriter
) -> None:
    vocab = vocabulary(model)
    header.model = Model.WORDLEVEL
    header.unknown = _unknown(vocab, model)
    header.trie = writer.pairs(trie(_whole_trie(vocab, in_bytes)))


def _unigram(
    model: Settings, in_bytes: bool, token_count: int, header: Header, writer: TableWriter
) -> None:
    vocab = vocabulary(model)
    scores = [float(score) for _, score in model["vocab"]]
    header.model = Model.UNIGRAM
    unknown = model.get("unk_id")
    header.unknown = NONE if unknown is None else unknown
    if model.get("byte_fallback"):
        header.flags |= Flag.BYTE_FALLBACK
        header.fallback = _fallback(vocab, writer)
    header.trie = writer.pairs(trie(_whole_trie(vocab, in_bytes)))
    padding = [0.0] * (token_count - len(scores))
    header.scores = writer.doubles([*scores, *padding, min(scores, default=0.0) - _UNKNOWN_PENALTY])


_KINDS: dict[str, Callable[[Settings, bool, int, Header, TableWriter], None]] = {
    "BPE": _bpe,
    "WordPiece": _wordpiece,
    "WordLevel": _wordlevel,
    "Unigram": _unigram,
}
