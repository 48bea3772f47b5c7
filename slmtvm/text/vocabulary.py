"""A vocabulary in files of its own to a tokenizer.json: vocab.txt, or vocab.json and merges.txt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError
from slmtvm.files import read_text
from slmtvm.text.settings import MAX_TOKENIZER_BYTES, Settings, read_settings

_BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
         "mask_token": "[MASK]"}  # fmt: skip
_MPNET = {**_BERT, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
          "mask_token": "<mask>"}  # fmt: skip
_WORDPIECE = {
    **dict.fromkeys(
        ("", "Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "Funnel", "LayoutLM"), _BERT
    ),
    "MPNet": _MPNET,
}
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
            "mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}  # fmt: skip
_GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_BYTE_BPE = {
    "": {},
    "GPT2": _GPT2,
    "CodeGen": _GPT2,
    "Roberta": _ROBERTA,
    "Bart": _ROBERTA,
    "Longformer": _ROBERTA,
    "Qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
# Qwen's own words: contractions, letters, single digits, marks, line ends, spaces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert_wordpiece(path: Path) -> str:
    """The tokenizer.json of a vocab.txt as BERT has it: a token a line, whose number is its id.

    Raises InvalidModelError where it is of another kind, or lacks a special token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    settings = read_settings(path)
    defaults = _of_kind(settings, _WORDPIECE)
    lines = read_text(path, MAX_TOKENIZER_BYTES, InvalidModelError).split("\n")
    vocabulary: dict[str, int] = {}
    for id_, line in enumerate(lines[:-1] if lines[-1] == "" else lines):
        vocabulary[line.rstrip("\r")] = id_
    unknown = _in(vocabulary, settings, "unk_token", defaults)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    lowercase = settings.flag("do_lower_case", default=True)
    accents = settings.fields.get("strip_accents")
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", default=True),
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    start = _in(vocabulary, settings, "cls_token", defaults)
    end = _in(vocabulary, settings, "sep_token", defaults)
    pair = f"{start} $A {end} {end} $B {end}" if defaults is _MPNET else None
    tokenizer.post_processor = _template(vocabulary, start, end, pair)
    return _finished(tokenizer, vocabulary, settings, defaults)


def convert_bpe(path: Path) -> str:
    """The tokenizer.json of a vocab.json with the merges.txt beside it, over bytes, as GPT-2's.

    Raises InvalidModelError where they are of another kind or do not fit each other.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    settings = read_settings(path)
    defaults = _of_kind(settings, _BYTE_BPE)
    vocabulary = _ids(path)
    if not {"a", "Ġ"} <= vocabulary.keys():  # of 256 characters that stand for bytes
        raise settings.not_converted()
    merges = _merges(path.with_name("merges.txt"))
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise InvalidModelError(f"does not fit merges.txt: {error}", where=str(path)) from error
    prefix = settings.flag("add_prefix_space", default=False)
    if settings.kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if defaults is _ROBERTA:
        start = _in(vocabulary, settings, "cls_token", defaults)
        end = _in(vocabulary, settings, "sep_token", defaults)
        pair = f"{start} $A {end} {end} $B {end}"
        tokenizer.post_processor = _template(vocabulary, start, end, pair)
    elif settings.flag("add_bos_token", default=False):
        start = _in(vocabulary, settings, "bos_token", defaults)
        tokenizer.post_processor = _template(vocabulary, start, None, None)
    return _finished(tokenizer, vocabulary, settings, defaults)


def _of_kind(settings: Settings, known: dict[str, dict[str, str]]) -> dict[str, str]:
    kind = settings.kind.removesuffix("Tokenizer")
    if kind not in known:
        raise settings.not_converted()
    return known[kind]


def _ids(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(read_text(path, MAX_TOKENIZER_BYTES, InvalidModelError))
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"is no JSON: {error}", where=str(path)) from error
    if not isinstance(vocabulary, dict) or not all(type(i) is int for i in vocabulary.values()):
        raise InvalidModelError("must hold tokens and their ids", where=str(path))
    return vocabulary


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path, MAX_TOKENIZER_BYTES, InvalidModelError).split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise InvalidModelError(
                f"line {number} must hold two tokens: {line!r}", where=str(path)
            )
        merges.append((pair[0], pair[1]))
    return merges


def _in(vocabulary: dict[str, int], settings: Settings, name: str, defaults: dict[str, str]) -> str:
    token = settings.token(name, defaults.get(name))
    if token is None or token not in vocabulary:
        raise InvalidModelError(
            f"lacks the {name} {token!r}; a tokenizer_config.json beside it may name another",
            where=str(settings.where),
        )
    return token


def _template(
    vocabulary: dict[str, int], start: str | None, end: str | None, pair: str | None
) -> Any:
    from tokenizers.processors import TemplateProcessing

    single = " ".join(filter(None, (start, "$A", end)))
    default = " ".join(
        filter(None, (start, "$A:0", end and f"{end}:0", "$B:1", end and f"{end}:1"))
    )
    tokens = [(token, vocabulary[token]) for token in dict.fromkeys((start, end)) if token]
    return TemplateProcessing(single=single, pair=pair or default, special_tokens=tokens)


def _finished(
    tokenizer: Any, vocabulary: dict[str, int], settings: Settings, defaults: dict[str, str]
) -> str:
    """``tokenizer`` with its added tokens, each under the id that the settings say."""
    from tokenizers import AddedToken

    special = [t for t in settings.special_tokens(defaults) if t in vocabulary]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    for id_, text, is_special in settings.added_tokens():
        token = AddedToken(text, special=is_special, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(text) != id_:
            raise InvalidModelError(
                f"the added token {text!r} has the id {id_}, after the vocabulary comes "
                f"{tokenizer.token_to_id(text)}; write a tokenizer.json",
                where=str(settings.where),
            )
    return str(tokenizer.to_str())
