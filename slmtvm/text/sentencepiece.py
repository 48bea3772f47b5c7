"""A SentencePiece model to a tokenizer.json.

Fields are those of sentencepiece_model.proto (github.com/google/sentencepiece, Apache 2.0).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError
from slmtvm.files import read_file
from slmtvm.text.settings import MAX_TOKENIZER_BYTES, Settings, read_settings

_SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.Type
_T5_EXTRA = 100  # tokens that T5 has after the vocabulary, the last one first
# Kinds, and whether they write the start and the end of a text.
_ENDS = {"T5Tokenizer": (False, True), "LlamaTokenizer": (True, False),
         "GemmaTokenizer": (True, False)}  # fmt: skip


def convert_sentencepiece(path: Path) -> str:
    """The tokenizer.json of a unigram or BPE model, whose kind the settings beside it say.

    Raises InvalidModelError where it is none, or is of a kind that is not converted.
    """
    from tokenizers import AddedToken, Tokenizer

    settings = read_settings(path)
    proto = _parse(path)
    if settings.kind not in _ENDS:
        raise settings.not_converted()
    pieces = [piece.piece for piece in proto.pieces]
    tokenizer = Tokenizer(_model(proto, settings))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False)])
    if settings.kind == "T5Tokenizer":
        extra = settings.fields.get("extra_ids", _T5_EXTRA)
        count = extra if isinstance(extra, int) else _T5_EXTRA
        names = [f"<extra_id_{i}>" for i in reversed(range(count))]
        tokenizer.add_special_tokens([AddedToken(n, special=True) for n in names])
    ids = {piece: id_ for id_, piece in enumerate(pieces)}
    tokenizer.post_processor = _ends(settings, proto.trainer_spec, pieces, ids)
    return str(tokenizer.to_str())


def _model(proto: Any, settings: Settings) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    if not 0 <= trainer.unk_id < len(proto.pieces):
        raise InvalidModelError(
            f"its unknown token {trainer.unk_id} is none of {len(proto.pieces)}",
            where=str(settings.where),
        )
    if trainer.model_type == _UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type == _BPE:
        return models.BPE(
            {piece.piece: id_ for id_, piece in enumerate(proto.pieces)},
            _merges(proto),
            unk_token=proto.pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    raise InvalidModelError(
        "is neither a unigram nor a BPE model; write a tokenizer.json", where=str(settings.where)
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, those of the best pieces first."""
    ids = {piece.piece: id_ for id_, piece in enumerate(proto.pieces)}
    found = []
    for piece in proto.pieces:
        pairs = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        ways = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        ways.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(piece.score, pair) for pair in ways]
    found.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in found]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))  # no other white space
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def _ends(settings: Settings, trainer: Any, pieces: list[str], ids: dict[str, int]) -> Any:
    """What puts the tokens of start and end around a text."""
    from tokenizers.processors import TemplateProcessing

    starts, ends = _ENDS[settings.kind]
    marks: list[str] = []
    for name, wanted, id_ in (
        ("bos_token", settings.flag("add_bos_token", default=starts), trainer.bos_id),
        ("eos_token", settings.flag("add_eos_token", default=ends), trainer.eos_id),
    ):
        mark = settings.token(name, pieces[id_] if 0 <= id_ < len(pieces) else None)
        if wanted and (mark is None or mark not in ids):
            raise InvalidModelError(f"lacks the {name} {mark!r}", where=str(settings.where))
        marks.append(mark if wanted and mark else "")
    start, end = marks
    single = " ".join(filter(None, (start, "$A:0", end)))
    pair = " ".join(
        filter(None, (start, "$A:0", end, start and f"{start}:1", "$B:1", end and f"{end}:1"))
    )
    tokens = [(mark, ids[mark]) for mark in dict.fromkeys(marks) if mark]
    return TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _parse(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    content = read_file(path, MAX_TOKENIZER_BYTES, InvalidModelError)
    try:
        proto = _model_proto().FromString(content)
    except DecodeError as error:
        raise InvalidModelError(f"not a SentencePiece model: {error}", where=str(path)) from error
    if not proto.pieces or not proto.HasField("trainer_spec"):
        raise InvalidModelError("not a SentencePiece model: it has no pieces", where=str(path))
    return proto


@cache
def _model_proto() -> Any:
    """The message ModelProto, of the fields that are read here."""
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="slmtvm_sentencepiece.proto", syntax="proto2")
    file.package = "slmtvm.sentencepiece"

    def message(name: str, *fields: tuple[str, int, int, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            label = kinds.LABEL_REPEATED if default == "[]" else kinds.LABEL_OPTIONAL
            added = made.field.add(name=field, number=number, type=kind, label=label)
            if kind == kinds.TYPE_MESSAGE:
                added.type_name = f".{file.package}.{_MESSAGES[field]}"
            elif default:
                added.default_value = default

    text, real, whole, flag = (
        kinds.TYPE_STRING, kinds.TYPE_FLOAT, kinds.TYPE_INT32, kinds.TYPE_BOOL,
    )  # fmt: skip
    message(
        "SentencePiece", ("piece", 1, text, ""), ("score", 2, real, ""), ("type", 3, whole, "1")
    )
    message(
        "TrainerSpec",
        ("model_type", 3, whole, "1"),
        ("byte_fallback", 35, flag, "false"),
        ("unk_id", 40, whole, "0"),
        ("bos_id", 41, whole, "1"),
        ("eos_id", 42, whole, "2"),
    )
    message(
        "NormalizerSpec",
        ("precompiled_charsmap", 2, kinds.TYPE_BYTES, ""),
        ("add_dummy_prefix", 3, flag, "true"),
        ("remove_extra_whitespaces", 4, flag, "true"),
    )
    message(
        "ModelProto",
        ("pieces", 1, kinds.TYPE_MESSAGE, "[]"),
        ("trainer_spec", 2, kinds.TYPE_MESSAGE, ""),
        ("normalizer_spec", 3, kinds.TYPE_MESSAGE, ""),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{file.package}.ModelProto")
    return message_factory.GetMessageClass(descriptor)


_MESSAGES = {
    "pieces": "SentencePiece", "trainer_spec": "TrainerSpec", "normalizer_spec": "NormalizerSpec",
}  # fmt: skip
