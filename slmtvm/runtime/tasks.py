"""Texts in, what a model's task makes of them out: labels, entities, answers, fills, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slmtvm.errors import SlmError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from slmtvm.runtime.session import Session

_START, _END = "start_logits", "end_logits"
_POOLED_STATE = "pooler_output"  # of a model that was trained for another task than embedding
_MASK_MARKS = ("[MASK]", "<mask>", "<|mask|>")
_MOST_ANSWER_TOKENS = 30
_WINDOW_OVERLAP = 4  # of windows of a long text that an answer is looked for in: a fraction of it
_OUTSIDE = "O"  # the label of a token that is in no entity

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Label:
    """A label and its score: a probability, or of a single label the number that comes out."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """Characters ``start`` to ``end`` of a text are a ``label``; ``score``: the mean of tokens."""

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answer:
    """Characters ``start`` to ``end`` of the text that was asked; ``score``: a probability."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Fill:
    """What may stand in the place of a mask: a token's text, and its probability."""

    text: str
    token: int
    score: float


def task_of(info: dict[str, Any]) -> str:
    """The one of ``task.TASKS`` that a model with this ``Session.info`` is for, by its outputs."""
    outputs = info["outputs"]
    names = [output["name"] for output in outputs]
    first = outputs[0]
    if _START in names and _END in names:
        return "answer"
    is_vocabulary = first["features"] == info["vocab_size"]
    if info["kind"] != "encoder" and is_vocabulary:
        return "generate"
    is_scores = first["name"].startswith(("logits", "score"))
    if not is_scores and len(_settings(info).get("labels", ())) != first["features"]:
        return "embed"
    if first["pooled"] or info["kind"] != "encoder":
        return "classify"
    return "fill" if is_vocabulary else "entities"


def classify(session: Session, text: str, pair: str | None = None) -> list[Label]:
    """The labels of a text, or of a pair of texts, the likeliest first.

    Their scores are probabilities, of each on its own where the model's settings say so; of a model
    with a single label, a regression or a reranker, what comes out as it is.
    """
    scores = _whole(session, _encode(session, text, pair))
    settings = _settings(session.info)
    if len(scores) > 1:
        scores = _sigmoid(scores) if settings.get("independent") else _softmax(scores)
    names = _labels(session.info, len(scores))
    order = np.argsort(-scores, kind="stable")
    return [Label(names[i], float(scores[i])) for i in order]


def entities(session: Session, text: str) -> list[Entity]:
    """Neighbouring tokens with one label, as one entity each; those without a label are left out.

    Labels B-x begin an entity of their own.
    """
    encoding = _encode(session, text)
    scores = _softmax(_whole(session, encoding))
    names = _labels(session.info, scores.shape[1])
    found: list[tuple[str, list[int]]] = []
    before = -1
    for token in _of_text(encoding):
        tag = names[int(scores[token].argmax())]
        prefix, _, label = tag.rpartition("-") if tag[1:2] == "-" else ("", "", tag)
        if tag == _OUTSIDE:
            continue
        joins = found and before == token - 1 and found[-1][0] == label and prefix != "B"
        if joins:
            found[-1][1].append(token)
        else:
            found.append((label, [token]))
        before = token
    return [_entity(encoding, text, label, tokens, scores) for label, tokens in found]


def _entity(encoding: Encoding, text: str, label: str, tokens: list[int], scores: Array) -> Entity:
    start, end = encoding.offsets[tokens[0]][0], encoding.offsets[tokens[-1]][1]
    score = float(np.float32(scores[tokens].max(axis=1).mean(dtype=np.float64)))
    return Entity(label, score, start, end, text[start:end])


def answer(session: Session, question: str, text: str) -> Answer:
    """The likeliest span of ``text`` that answers the question.

    A text that does not fit the context with its question is read in windows that overlap. Raises
    SlmError where not even a part of it fits.
    """
    best: Answer | None = None
    for encoding in _windows(session, question, text):
        outputs = _outputs(session, encoding)
        start, end = outputs[_START].reshape(-1), outputs[_END].reshape(-1)
        found = _best_span(encoding, text, start, end)
        if found is not None and (best is None or found.score > best.score):
            best = found
    if best is None:
        raise SlmError("the text is empty: there is nothing to find an answer in")
    return best


def _windows(session: Session, question: str, text: str) -> list[Encoding]:
    tokenizer, context = session.tokenizer, int(session.info["context"])
    asked = len(_encode(session, question).ids)
    special = tokenizer.num_special_tokens_to_add(True)
    room = context - asked - special
    if room < 1:
        raise SlmError(f"the question has {asked} tokens: no text fits the context of {context}")
    tokenizer.enable_truncation(context, stride=room // _WINDOW_OVERLAP, strategy="only_second")
    try:
        encoding = _checked(tokenizer, question, text)
    finally:
        tokenizer.no_truncation()
    return [encoding, *encoding.overflowing]


def _best_span(encoding: Encoding, text: str, start: Array, end: Array) -> Answer | None:
    inside = np.array([s == 1 for s in encoding.sequence_ids])
    if not inside.any():
        return None
    # Of the whole sequence: a model that finds no answer points at a special token.
    pairs = _softmax(start)[:, None] * _softmax(end)[None]
    place = np.arange(len(start))
    length = place[None] - place[:, None]
    allowed = inside[:, None] & inside[None] & (length >= 0) & (length < _MOST_ANSWER_TOKENS)
    first, last = divmod(int(np.where(allowed, pairs, -1).argmax()), len(start))
    begin, stop = encoding.offsets[first][0], encoding.offsets[last][1]
    return Answer(text[begin:stop], float(pairs[first, last]), begin, stop)


def fill(session: Session, text: str, top: int = 5) -> list[list[Fill]]:
    """For each mask of the text the ``top`` likeliest tokens.

    Raises SlmError where there is none.
    """
    tokenizer = session.tokenizer
    marks = [mark for mark in _MASK_MARKS if tokenizer.token_to_id(mark) is not None]
    masks = {tokenizer.token_to_id(mark) for mark in marks}
    encoding = _encode(session, text)
    places = [i for i, token in enumerate(encoding.ids) if token in masks]
    if not places:
        known = ", ".join(marks) or "its tokenizer has none"
        raise SlmError(f"the text has no mask to fill ({known})")
    scores = _softmax(_whole(session, encoding)[places])
    found = []
    for row in scores:
        tokens = np.argsort(-row, kind="stable")[:top]
        found.append([Fill(tokenizer.decode([int(t)]), int(t), float(row[t])) for t in tokens])
    return found


@dataclass(frozen=True)
class Embedding:
    """A text's embedding float32 (features,), and how rows became it, "" where the graph did it."""

    values: Array
    pooling: str


def embed(
    session: Session, text: str, *, pooling: str = "", normalize: bool | None = None
) -> Embedding:
    """The embedding of a text: the model's own, or its rows pooled.

    ``pooling``: "mean", "weightedmean" (row i weighs i + 1), "first", "last" or "max" of the rows
    of tokens, in the place of what the model does; by default, where its graph does not pool, what
    its settings say, else the mean.
    ``normalize``: make its length 1; by default as the settings say.
    """
    encoding = _encode(session, text)
    settings = _settings(session.info)
    own = _own_embedding(session.info)
    if own and not pooling:
        values = _outputs(session, encoding)[own]
    else:
        pooling = pooling or settings.get("pooling") or "mean"
        values = _pool(_rows(session, encoding), pooling)
    if settings.get("normalize") if normalize is None else normalize:
        values = values / max(float(np.linalg.norm(values.astype(np.float64))), 1e-12)
    return Embedding(np.asarray(values, np.float32), pooling)


def pools_itself(info: dict[str, Any]) -> bool:
    """Whether a model with this ``Session.info`` has an output that is an embedding."""
    return bool(_own_embedding(info))


def _own_embedding(info: dict[str, Any]) -> str:
    """The output that is an embedding; "" where there are rows of tokens alone."""
    names = [o["name"] for o in info["outputs"] if o["pooled"] and o["name"] != _POOLED_STATE]
    if names:
        return str(names[0])
    return "" if _row_output(info) else str(info["outputs"][0]["name"])


def _row_output(info: dict[str, Any]) -> str:
    names = [str(o["name"]) for o in info["outputs"] if not o["pooled"]]
    return names[0] if names else ""


def _rows(session: Session, encoding: Encoding) -> Array:
    name = _row_output(session.info)
    if not name:
        raise SlmError("the model gives no rows of tokens to pool: its graph pools them itself")
    if session.info["kind"] == "encoder":
        return _outputs(session, encoding)[name]
    session.reset()
    return session.eval_all(encoding.ids)


def _pool(rows: Array, how: str) -> Array:
    if how in ("first", "last"):
        return rows[0 if how == "first" else -1]
    if how == "weightedmean":
        weights = np.arange(1, len(rows) + 1, dtype=np.float32)
        return np.asarray((rows * weights[:, None]).sum(axis=0) / np.float32(weights.sum()))
    return np.asarray(rows.mean(axis=0) if how == "mean" else rows.max(axis=0))


def _whole(session: Session, encoding: Encoding) -> Array:
    """The first output of a whole text."""
    return _outputs(session, encoding)[session.info["outputs"][0]["name"]]


def _outputs(session: Session, encoding: Encoding) -> dict[str, Array]:
    if session.info["kind"] != "encoder":
        session.reset()
        return session.outputs(encoding.ids)
    types = encoding.type_ids if session.info["segments"] else None
    return session.outputs(encoding.ids, segments=types)


def _settings(info: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = info.get("task", {})
    return settings


def _labels(info: dict[str, Any], count: int) -> Sequence[str]:
    labels = _settings(info).get("labels", ())
    return labels if len(labels) == count else [f"LABEL_{i}" for i in range(count)]


def _encode(session: Session, text: str, pair: str | None = None) -> Encoding:
    """The tokens of a text; raises SlmError where there are none, or more than fit the context."""
    tokenizer = session.tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoding = _checked(tokenizer, text, pair)
    count, context = len(encoding.ids), int(session.info["context"])
    if not count:
        raise SlmError("the text is empty: a model needs at least one token")
    if count > context:
        raise SlmError(f"the text has {count} tokens, which do not fit the context of {context}")
    return encoding


def _checked(tokenizer: Tokenizer, text: str, pair: str | None) -> Encoding:
    try:
        return tokenizer.encode(text, pair)
    except (TypeError, UnicodeEncodeError) as error:  # a command line may hold any bytes
        raise SlmError(f"it is no valid text: {text!r}") from error


def _of_text(encoding: Encoding) -> Iterator[int]:
    """The tokens that stand for characters of the text."""
    for token, (special, (start, end)) in enumerate(
        zip(encoding.special_tokens_mask, encoding.offsets, strict=True)
    ):
        if not special and end > start:
            yield token


def _softmax(scores: Array) -> Array:
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def _sigmoid(scores: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-scores.astype(np.float64))), np.float32)
