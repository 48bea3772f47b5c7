"""Text in, text out: a session's tokens as its bundle's tokenizer reads and writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slmtvm.errors import SlmError
from slmtvm.text.end_marks import END_MARKS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from slmtvm.runtime.constraint import Constraint
    from slmtvm.runtime.session import Session

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_DAMAGED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_PADDING_MARKS = ("<pad>", "[PAD]", "<|pad|>")


def end_tokens(session: Session) -> frozenset[int]:
    """The ids after which a text is over: the model's settings say it, else the tokenizer."""
    if said := session.info.get("end"):
        return frozenset(said)
    ids = (session.tokenizer.token_to_id(mark) for mark in END_MARKS)
    return frozenset(id_ for id_ in ids if id_ is not None)


def _usual_start(session: Session) -> int:
    """The token that the model's settings say, else that of most encoder-decoders: padding."""
    if (said := session.info.get("start")) is not None:
        return int(said)
    ids = (session.tokenizer.token_to_id(mark) for mark in _PADDING_MARKS)
    token = next((id_ for id_ in ids if id_ is not None), 0)
    if token in session.info.get("padding", ()):
        raise SlmError(
            f"this model's positions leave out padding ({token}), so that its texts do not start "
            "from it; say which token they start from (--start)"
        )
    return token


def generate_text(
    session: Session,
    prompt: str,
    max_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    start: int | None = None,
    stop: Sequence[str] = (),
    constraint: Constraint | None = None,
) -> Iterator[str]:
    """Continue ``prompt``: pieces of text, each as soon as its characters are whole.

    An encoder-decoder reads the prompt as its source and writes another text. It starts from the
    token ``start``, by default the one in the model's settings (``decoder_start_token_id``) or the
    tokenizer's padding token, which most are trained with.
    Ends at a token that ends a text, and before the first text of ``stop``; a piece waits until it
    cannot be the start of one. The other parameters are those of ``Session.generate``. Raises
    SlmError where the prompt is empty or does not fit the context, the bundle has no tokenizer, or
    a text cannot start from padding.
    """
    tokenizer = session.tokenizer
    try:
        ids = tokenizer.encode(prompt).ids
    except (TypeError, UnicodeEncodeError) as error:  # a command line may hold any bytes
        raise SlmError(f"the prompt is no valid text: {prompt!r}") from error
    return continue_tokens(
        session,
        ids,
        max_tokens,
        start=start,
        stop=stop,
        constraint=constraint,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        seed=seed,
    )


def continue_tokens(
    session: Session,
    ids: list[int],
    max_tokens: int,
    *,
    known: int = 0,
    start: int | None = None,
    stop: Sequence[str] = (),
    constraint: Constraint | None = None,
    heard: Callable[[int], object] | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """``generate_text`` of a prompt in tokens, of which the session holds the first ``known``.

    ``heard`` is told each token that is written.
    """
    if not ids:
        raise SlmError("the prompt is empty: a model needs at least one token to continue")
    if session.info["kind"] == "encoder-decoder":
        first = _usual_start(session) if start is None else start
        session.encode(ids)
        ids = [first]
    tokens = session.generate(
        ids[known:],
        max_tokens,
        # Where an end may come a constraint says.
        stop=end_tokens(session) if constraint is None else (),
        constraint=constraint,
        **sampling,
    )
    pieces = decode_stream(session.tokenizer, ids, _told(tokens, heard))
    return cut_at_stop(pieces, stop) if stop else pieces


def _told(tokens: Iterator[int], heard: Callable[[int], object] | None) -> Iterator[int]:
    for token in tokens:
        if heard is not None:
            heard(token)
        yield token


def cut_at_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """``pieces`` up to the first of ``stop``, which may begin in one and end in another.

    Raises SlmError where one of them is empty.
    """
    if not all(stop):
        raise SlmError("a text that ends another one must not be empty")
    return _cut(pieces, stop)


def _cut(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        held += piece
        found = [at for mark in stop if (at := held.find(mark)) >= 0]
        if found:
            held = held[: min(found)]
            break
        # The longest end of the text that may go on to be one of them.
        sizes = (n for n in range(min(len(held), max(map(len, stop)) - 1), 0, -1))
        waits = next((n for n in sizes if any(m.startswith(held[-n:]) for m in stop)), 0)
        if ready := held[: len(held) - waits]:
            yield ready
        held = held[len(held) - waits :]
    if held:
        yield held


def decode_stream(tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text of ``tokens`` after ``prompt``, piece by piece: joined, what decoding at once gives.

    A character may be spread over several tokens: they give one piece. What is left of one at the
    end comes out as U+FFFD.
    """
    skipped = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    in_bytes = _falls_back_to_bytes(tokenizer)
    # What is decoded again with every token, since whether a word starts with a space depends on
    # what is before it, and its text.
    context = list(prompt)
    shown = tokenizer.decode(context)
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        if token in skipped or (in_bytes and _BYTE.fullmatch(tokenizer.id_to_token(token) or "")):
            continue  # whether bytes are characters is known at the end of their row
        text = tokenizer.decode([*context, *pending])
        piece = _after(shown, text)
        if not piece or text.endswith(_DAMAGED):
            continue
        yield piece
        # Decoders strip the start of a text: what is kept must have some.
        context = pending if tokenizer.decode(pending) else [*context, *pending]
        shown, pending = tokenizer.decode(context), []
    text = tokenizer.decode([*context, *pending])
    if rest := _after(shown, text):
        yield rest


def _after(shown: str, text: str) -> str:
    """What ``text`` has after ``shown``, or after what both start with: a prompt may end in half a
    character."""
    if text.startswith(shown):
        return text[len(shown) :]
    pairs = zip(shown, text, strict=False)
    return text[next((i for i, (a, b) in enumerate(pairs) if a != b), len(text)) :]


def _falls_back_to_bytes(tokenizer: Tokenizer) -> bool:
    """Whether tokens such as <0x0A> are bytes: several that are no UTF-8 are all damaged then."""
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return any(d["type"] == "ByteFallback" for d in (decoder, *decoder.get("decoders", ())))
