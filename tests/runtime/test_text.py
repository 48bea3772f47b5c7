"""Text comes out of tokens piece by piece, whole characters only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import create_autospec

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from slmtvm.errors import SlmError
from slmtvm.runtime import Session
from slmtvm.runtime.text import cut_at_stop, decode_stream, end_tokens, generate_text
from tests.models import TOKENIZER


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.mark.parametrize(
    "text",
    [
        "def read_file(path):\n    return path\n",
        "naïve café — 日本語 🐍🐍 ok",
        "   leading and trailing   ",
        "\t\n\n\r\n",
    ],
)
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text).ids
    pieces = list(decode_stream(tokenizer, [], iter(tokens)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_of_several_tokens_is_one_piece(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🐍").ids
    assert len(tokens) > 1
    assert list(decode_stream(tokenizer, [], iter(tokens))) == ["🐍"]


def test_half_a_character_at_the_end_is_shown_as_one_that_is_damaged(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ok🐍").ids[:-1]
    text = "".join(decode_stream(tokenizer, [], iter(tokens)))
    assert text.startswith("ok")
    assert set(text[2:]) == {"\ufffd"}


def test_a_piece_is_given_as_soon_as_its_token_is_known(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("for x in range(10):").ids
    taken = []

    def watched() -> Iterator[int]:
        for token in tokens:
            taken.append(token)
            yield token

    first = next(decode_stream(tokenizer, [], watched()))
    assert first == tokenizer.decode(tokens[:1])
    assert len(taken) == 1


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama's: unknown characters are written in bytes, a text starts without a space."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁a", "b", "▁x", "'", "}"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes of words", "byte fallback"])
def test_pieces_of_any_tokens_join_to_what_decoding_at_once_gives(
    tokenizer: Tokenizer, kind: str
) -> None:
    chosen = tokenizer if kind == "bytes of words" else byte_fallback_tokenizer()
    random = np.random.default_rng(0)
    size = chosen.get_vocab_size()
    compared = 0
    for _ in range(2000):
        prompt, tokens = (random.integers(size, size=random.integers(n)).tolist() for n in (4, 12))
        before, whole = chosen.decode(prompt), chosen.decode([*prompt, *tokens])
        if whole.startswith(before):  # else the prompt ends in the middle of a character
            assert before + "".join(decode_stream(chosen, prompt, iter(tokens))) == whole
            compared += 1
    assert compared > 1000


def test_bytes_wait_for_the_end_of_their_row() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokens = [tokenizer.token_to_id(t) for t in ("▁a", "<0xC3>", "</s>", "<0xA9>", "b", "▁x")]
    assert list(decode_stream(tokenizer, [], iter(tokens))) == ["a", "éb", " x"]


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_a_session_s_tokenizer_neither_pads_nor_cuts(
    tokenizer: Tokenizer, setting: str, tmp_path: Path
) -> None:
    changed = Tokenizer.from_str(tokenizer.to_str())
    if setting == "padding":
        changed.enable_padding(length=32)
    else:
        changed.enable_truncation(max_length=8)
    changed.save(str(tmp_path / "tokenizer.json"))
    text = "def read_file(path, mode):"
    assert changed.encode(text).ids != tokenizer.encode(text).ids
    model = SimpleNamespace(
        bundle=SimpleNamespace(tokenizer=lambda: tmp_path / "tokenizer.json"),
        library=SimpleNamespace(call=lambda *_: 0),
        handle=None,
    )
    assert Session(cast(Any, model)).tokenizer.encode(text).ids == tokenizer.encode(text).ids


def a_session(tokenizer: Tokenizer, **info: object) -> Any:
    session = create_autospec(Session, instance=True, tokenizer=tokenizer)
    session.info = info
    session.generate.return_value = iter(())
    return session


def test_the_end_mark_of_the_tokenizer_ends_a_text(tokenizer: Tokenizer) -> None:
    session = a_session(tokenizer, end=[])
    assert end_tokens(session) == {tokenizer.token_to_id("<|endoftext|>")} == {0}


def test_what_the_settings_say_ends_a_text_instead(tokenizer: Tokenizer) -> None:
    assert end_tokens(a_session(tokenizer, end=[3, 9])) == {3, 9}


@pytest.mark.parametrize(("start", "first"), [(None, 2), (5, 5)])
def test_a_text_starts_where_the_settings_say_unless_it_is_told(
    tokenizer: Tokenizer, start: int | None, first: int
) -> None:
    session = a_session(tokenizer, kind="encoder-decoder", padding=[0], start=2)
    assert list(generate_text(session, "source", start=start)) == []
    assert session.generate.call_args.args[0] == [first]


@pytest.mark.parametrize("start", [None, 5])
def test_a_text_does_not_start_from_padding_that_positions_leave_out(
    tokenizer: Tokenizer, start: int | None
) -> None:
    session = a_session(tokenizer, kind="encoder-decoder", padding=[0])
    if start is None:
        with pytest.raises(SlmError, match=r"which token they start from \(--start\)"):
            generate_text(session, "source", start=start)
    else:
        assert list(generate_text(session, "source", start=start)) == []
        assert session.generate.call_args.args[0] == [5]


@pytest.mark.parametrize("stop", [["ab"], ["bca", "ab"], ["xx", "c"], ["abcabc"], ["z"]])
def test_a_text_ends_before_the_first_stop_string_however_it_comes_in_pieces(
    stop: list[str],
) -> None:
    text = "xaxabcabxxc"
    wanted = text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]
    for size in range(1, len(text) + 1):
        pieces = (text[at : at + size] for at in range(0, len(text), size))
        assert "".join(cut_at_stop(pieces, stop)) == wanted
    with pytest.raises(SlmError, match="empty"):
        cut_at_stop(iter(()), [""])
