"""Tokenizers of every kind that small models have, trained on a few texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.models import HELDOUT
from tests.text.agreement import random_texts
from tests.text.charsmaps import NORMALIZED, charsmap

N, P, D = normalizers, pre_tokenizers, decoders
SPECIALS = ("<s>", "</s>", "<pad>", " <sp> ", "Word")
_CORPUS_CHARACTERS = 40_000
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def corpus() -> list[str]:
    text = HELDOUT.read_bytes().decode()[:_CORPUS_CHARACTERS]
    return [*text.split("\n"), *random_texts(300, seed=9)]


def bpe(
    pre: Any, dec: Any = None, norm: Any = None, train: dict[str, Any] | None = None, **model: Any
) -> Tokenizer:
    options = {"vocab_size": 800, "special_tokens": ["<unk>"], "show_progress": False}
    tokenizer = Tokenizer(models.BPE(**{"unk_token": "<unk>", **model}))
    tokenizer.pre_tokenizer = pre
    if dec is not None:
        tokenizer.decoder = dec
    if norm is not None:
        tokenizer.normalizer = norm
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(**{**options, **(train or {})}))
    return tokenizer


def byte_bpe(regex: str | None = None, *, prefix: bool = False, norm: Any = None) -> Tokenizer:
    pre = P.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    if regex is not None:
        pre = P.Sequence([P.Split(Regex(regex), "isolated"), pre])
    alphabet = {"initial_alphabet": P.ByteLevel.alphabet()}
    return bpe(pre, D.ByteLevel(), norm, alphabet)


def fallback_bpe(pre: Any = None, norm: Any = None, dec: Any = None) -> Tokenizer:
    """As SentencePiece's: unknown characters are written in bytes."""
    train = {"special_tokens": ["<unk>", *_BYTES], "limit_alphabet": 60}
    tokenizer = bpe(P.Metaspace(), dec, norm, train, byte_fallback=True, fuse_unk=True)
    tokenizer.pre_tokenizer = pre
    return tokenizer


def edited(tokenizer: Tokenizer, **model: Any) -> Tokenizer:
    """The same with other fields of its model."""
    settings = json.loads(tokenizer.to_str())
    settings["model"].update(model)
    return Tokenizer.from_str(json.dumps(settings))


def wordpiece(norm: Any = None, pre: Any = None, dec: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=12))
    if norm is not None:
        tokenizer.normalizer = norm
    tokenizer.pre_tokenizer = pre or P.BertPreTokenizer()
    if dec is not None:
        tokenizer.decoder = dec
    marks = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=marks, show_progress=False, limit_alphabet=80
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def wordlevel() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = P.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=500, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def unigram(norm: Any = None, dec: Any = None, *, in_bytes: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = P.Metaspace()
    tokenizer.decoder = dec or D.Metaspace()
    if norm is not None:
        tokenizer.normalizer = norm
    marks = ["<pad>", "</s>", "<unk>", *(_BYTES if in_bytes else [])]
    trainer = trainers.UnigramTrainer(
        vocab_size=400 + len(marks), special_tokens=marks, unk_token="<unk>",
        show_progress=False, max_piece_length=8,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    return edited(tokenizer, byte_fallback=True) if in_bytes else tokenizer


def processed(make: Callable[[tuple[str, int], tuple[str, int]], Any], prefix: bool) -> Tokenizer:
    """Bytes with what ``make`` puts around texts, of the tokens of their start and their end."""
    tokenizer = byte_bpe(prefix=prefix)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start, end = (("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>")))
    tokenizer.post_processor = make(start, end)
    return tokenizer


def _template(start: tuple[str, int], end: tuple[str, int]) -> Any:
    single, pair = "<s> $A </s>", "<s> $A </s> $B:1 </s>:1"
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[start, end])
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), template])


def _rows(count: int) -> Any:
    return D.Sequence([D.Replace("▁", " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", count, 0)])


_LLAMA_2 = N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])
_SPACES = N.Sequence(
    [N.Strip(right=False), N.Replace(Regex(r"\A +| +\z"), ""), N.Replace(Regex(" {2,}"), "▁")]
)
_FORMS = N.Sequence([N.NFKC(), N.Lowercase(), N.StripAccents()])

# What models have: the first ones are tested by default.
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama 3": lambda: byte_bpe(_LLAMA_3),
    "gpt-4": lambda: byte_bpe(_GPT_4, norm=N.NFC()),
    "llama 2": lambda: fallback_bpe(norm=_LLAMA_2, dec=_rows(1)),
    "bert": lambda: wordpiece(N.BertNormalizer(), dec=D.WordPiece()),
    "albert": lambda: unigram(_FORMS),
    "roberta": lambda: processed(
        lambda start, end: processors.RobertaProcessing(end, start), prefix=True
    ),
    "xlm-roberta": lambda: unigram(N.Precompiled(charsmap(NORMALIZED))),
    "gpt-4o": lambda: byte_bpe(_GPT_4O),
    "gpt-2 with a prefix": lambda: byte_bpe(prefix=True),
    "whole words": lambda: edited(byte_bpe(_LLAMA_3), ignore_merges=True),
    "digits": lambda: bpe(
        P.Sequence([P.Digits(individual_digits=True), P.ByteLevel(add_prefix_space=False)]),
        D.ByteLevel(),
    ),
    "first metaspace": lambda: fallback_bpe(
        P.Metaspace(prepend_scheme="first", split=False), dec=_rows(0)
    ),
    "no metaspace": lambda: fallback_bpe(P.Metaspace(prepend_scheme="never"), _SPACES, _rows(2)),
    "unknown characters": lambda: bpe(P.Whitespace(), train={"limit_alphabet": 40}),
    "dropped characters": lambda: bpe(
        P.Whitespace(), train={"limit_alphabet": 40, "special_tokens": []}, unk_token=None
    ),
    "affixes": lambda: bpe(
        P.WhitespaceSplit(),
        D.BPEDecoder(suffix="</w>"),
        train={"end_of_word_suffix": "</w>", "limit_alphabet": 50},
        end_of_word_suffix="</w>",
    ),
    "clip": lambda: bpe(
        P.Sequence(
            [P.Split(Regex(_CLIP), "removed", invert=True), P.ByteLevel(add_prefix_space=False)]
        ),
        D.ByteLevel(),
        N.Sequence([N.NFC(), N.Replace(Regex(r"\s+"), " "), N.Lowercase()]),
        {"end_of_word_suffix": "</w>"},
        end_of_word_suffix="</w>",
    ),
    "cased bert": lambda: wordpiece(
        N.BertNormalizer(lowercase=False), dec=D.WordPiece(cleanup=False)
    ),
    "wordpiece of bytes": lambda: wordpiece(N.NFKC(), P.ByteLevel()),
    "words": wordlevel,
    "t5": lambda: unigram(N.Sequence([N.Nmt(), N.NFKD()])),
    "unigram in bytes": lambda: unigram(dec=_rows(1), in_bytes=True),
    "template": lambda: processed(_template, prefix=True),
    "bert's tokens": lambda: processed(
        lambda start, end: processors.BertProcessing(end, start), prefix=False
    ),
    **{
        f"pre-tokenizer {name}": lambda pre=pre: wordpiece(pre=pre)  # type: ignore[misc]
        for name, pre in (
            ("white space", P.WhitespaceSplit()),
            ("marks in rows", P.Sequence([P.WhitespaceSplit(), P.Punctuation("contiguous")])),
            ("marks with what is before", P.Punctuation("merged_with_previous")),
            ("marks with what is behind", P.Punctuation("merged_with_next")),
            ("marks removed", P.Punctuation("removed")),
            ("digits in rows", P.Digits()),
            ("delimiter", P.CharDelimiterSplit("a")),
            ("string", P.Split("s", "merged_with_previous")),
            ("lazy", P.Split(Regex("[a-e]{2,3}?|[[:punct:]&&[^.]]"), "merged_with_next", True)),
        )
    },
}


def make(name: str, *, normalized: bool = False) -> Tokenizer:
    """The tokenizer of a kind, with added tokens that are ``normalized`` before they are found."""
    tokenizer = KINDS[name]()
    tokenizer.add_special_tokens(
        [AddedToken("<s>"), AddedToken("</s>", lstrip=True), AddedToken("<pad>", rstrip=True)]
    )
    tokenizer.add_tokens(
        [
            AddedToken("Word", single_word=True, normalized=normalized),
            AddedToken("<sp>", lstrip=True, rstrip=True, normalized=normalized),
        ]
    )
    return tokenizer
