"""A tokenizer.json compiled to tokenizer.bin: tables that the C runtime follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from slmtvm.errors import UnsupportedTokenizerError
from slmtvm.text.characters import white_space, word_characters
from slmtvm.text.decoders import Texts, token_texts
from slmtvm.text.models import byte_characters, write_model
from slmtvm.text.normalizers import normalizer_steps, reference_normalizer
from slmtvm.text.pre_tokenizers import pre_tokenizer
from slmtvm.text.processors import Template, templates
from slmtvm.text.steps import Added, AddedToken, Step, write_steps
from slmtvm.text.tables import NONE, Header, TableWriter

Settings = dict[str, Any]
_WORD, _SPACE = 1, 2  # SLM_KIND_ of codegen/runtime/text.h
_SKIPPED, _BYTE, _SPACE_AFTER = 1, 2, 4  # SLM_TOKEN_


def compile_tokenizer(content: bytes) -> bytes:
    """tokenizer.bin of a tokenizer.json, which the `tokenizers` package has read without an error.

    Padding and truncation are left out: a session does neither. Equal input gives equal bytes.
    Raises UnsupportedTokenizerError, naming the part, where it asks for what is not compiled.
    """
    from tokenizers import Tokenizer

    # The package writes older spellings of the file anew.
    package = Tokenizer.from_buffer(content)
    settings: Settings = json.loads(package.to_str())
    try:
        return _compile(settings, package.id_to_token)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedTokenizerError(f"a field is not as expected: {error!r}") from error


def read_texts(content: bytes) -> tuple[Texts, list[bool]]:
    """What each token of a tokenizer.json is in a text, and whether texts are written without it.

    Raises UnsupportedTokenizerError, naming the part, where its decoder is not compiled.
    """
    from tokenizers import Tokenizer

    package = Tokenizer.from_buffer(content)
    settings: Settings = json.loads(package.to_str())
    try:
        names = _names(settings["model"], settings["added_tokens"])
        texts, shown = _shown_texts(settings, names, package.id_to_token)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedTokenizerError(f"a field is not as expected: {error!r}") from error
    return texts, _skipped(settings, shown)


def _compile(settings: Settings, text_of: Callable[[int], str | None]) -> bytes:
    added: list[Settings] = settings["added_tokens"]
    names = _names(settings["model"], added)
    pre = pre_tokenizer(settings["pre_tokenizer"])
    normal = normalizer_steps(settings["normalizer"])
    steps = [
        *_added(added, normalized=False, normalize=str),
        *normal,
        *_added(added, normalized=True, normalize=_normalize(settings["normalizer"])),
        *pre.steps,
    ]
    header, writer = Header(tokens=len(names)), TableWriter()
    header.step_count = len(steps)
    header.steps = write_steps(steps, writer)
    write_model(settings["model"], pre.in_bytes, len(names), header, writer)
    _write_kinds(any(t["single_word"] for t in added), header, writer)
    _write_texts(settings, names, text_of, header, writer)
    _write_templates(settings, names, header, writer)
    return writer.finish(header)


def _names(model: Settings, added: list[Settings]) -> list[str]:
    """The tokens by id; "" where there is none."""
    vocab = model["vocab"]
    listed = enumerate(piece[0] for piece in vocab) if isinstance(vocab, list) else (
        (id_, name) for name, id_ in vocab.items()
    )  # fmt: skip
    ids = dict(listed)
    ids.update({token["id"]: token["content"] for token in added})
    if not ids:
        raise UnsupportedTokenizerError("it has no tokens")
    return [ids.get(id_, "") for id_ in range(max(ids) + 1)]


def _added(tokens: list[Settings], normalized: bool, normalize: Callable[[str], str]) -> list[Step]:
    found = tuple(
        AddedToken(content, t["id"], t["single_word"], t["lstrip"], t["rstrip"])
        for t in tokens
        if t["normalized"] == normalized and (content := normalize(t["content"]))
    )
    return [Added(found)] if found else []


def _normalize(normalizer: Settings | None) -> Callable[[str], str]:
    if normalizer is None:
        return str
    return reference_normalizer(normalizer)


def _write_kinds(words: bool, header: Header, writer: TableWriter) -> None:
    """Which characters are white space, and, where ``words`` are asked for, parts of words."""
    kinds = white_space() * np.uint16(_SPACE)
    if words:
        kinds = kinds + word_characters() * np.uint16(_WORD)
    header.kinds = writer.char_map(kinds.astype(np.uint16))


def _write_texts(
    settings: Settings,
    names: list[str],
    text_of: Callable[[int], str | None],
    header: Header,
    writer: TableWriter,
) -> None:
    texts, shown = _shown_texts(settings, names, text_of)
    header.first_texts = writer.strings(texts.first)
    header.texts = writer.strings(texts.other)
    header.names = writer.strings([name.encode() for name in names])
    header.token_flags = writer.words(
        [
            _SKIPPED * skipped + _BYTE * byte + _SPACE_AFTER * space
            for skipped, byte, space in zip(
                _skipped(settings, shown), texts.is_byte, texts.space_after, strict=True
            )
        ]
    )
    header.stripped = writer.strings([texts.stripped.encode()])
    header.stripped_count = texts.stripped_count


def _shown_texts(
    settings: Settings, names: list[str], text_of: Callable[[int], str | None]
) -> tuple[Texts, list[str]]:
    """The texts of the tokens ``names``, and what the decoder made them of."""
    # What a decoder gets of added tokens that are normalized depends on the package's release: as
    # they are written before 0.23, as they are looked for since.
    shown = list(names)
    for token in settings["added_tokens"]:
        if token["normalized"]:
            shown[token["id"]] = text_of(token["id"]) or ""
    return token_texts(settings["decoder"], shown), shown


def _skipped(settings: Settings, shown: list[str]) -> list[bool]:
    special = {t["content"] for t in settings["added_tokens"] if t["special"]}
    return [name in special or name == "" for name in shown]


def _write_templates(
    settings: Settings, names: list[str], header: Header, writer: TableWriter
) -> None:
    made = templates(settings["post_processor"])
    header.flags |= made.flags
    if made.flags:
        trims = [_spaces(name) for name in names]
        for token in settings["added_tokens"]:
            trims[token["id"]] = NONE
        header.trims = writer.words(trims)

    def write(template: Template) -> tuple[int, int]:
        return writer.words([word for piece in template for word in piece]), len(template)

    header.single, header.single_count = write(made.single)
    header.pair, header.pair_count = write(made.pair)


def _spaces(name: str) -> int:
    """White space at the start of a token, and 65536 times that at its end."""
    spaces = white_space()
    space = next(c for c, byte in byte_characters().items() if byte == ord(" "))

    def count(characters: str) -> int:
        for n, c in enumerate(characters):
            if c != space and not spaces[ord(c)]:
                return n
        return len(characters)

    return min(count(name), 0xFFFF) | min(count(name[::-1]), 0xFFFF) << 16
