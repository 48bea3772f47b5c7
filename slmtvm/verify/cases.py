"""What is compared: windows of tokens, and masks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slmtvm.errors import SlmError
from slmtvm.verify.reference import Reference

_SEED = 0
_RANDOM_TOKENS = 257  # a window and what follows its last token
_HIDDEN = 0.25  # of the tokens of a masked window

Tokens = Sequence[int] | npt.NDArray[Any]  # (n,), or (windows, n)


class Runner(Protocol):
    """What a comparison of every output needs of a session."""

    @property
    def info(self) -> dict[str, Any]: ...

    def reset(self) -> None: ...

    def outputs(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None = None,
        segments: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]: ...


class Evaluator(Runner, Protocol):
    """What verification needs of a session."""

    def eval_all(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...

    def encode(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Case:
    """A window's ``tokens`` int32 (n,), those that follow them, and which of them are visible.

    An encoder-decoder reads the tokens as its source and goes on with them as its text.
    """

    tokens: np.ndarray
    following: np.ndarray
    kind: str  # of the model
    mask: np.ndarray | None = None  # of the source where there is one; None: all are
    padding: int | None = None  # what hidden tokens are instead, where that matters
    single: int = 0  # of the last tokens a decoder takes so many one by one

    @property
    def masked(self) -> np.ndarray:
        """The tokens int32 (n,) that go with the mask."""
        if self.mask is None or self.padding is None:
            return self.tokens
        return np.where(self.mask, self.tokens, self.padding).astype(np.int32)

    @property
    def seen(self) -> np.ndarray | slice:
        """The rows that are compared: those of visible tokens."""
        if self.mask is None or self.kind == "encoder-decoder":
            return slice(None)
        return self.mask

    def session_rows(self, session: Evaluator) -> np.ndarray:
        """The rows float32 (visible, features) of a compiled model."""
        given = (self.masked,) if self.mask is None else (self.masked, self.mask)
        if self.kind == "encoder":
            return session.encode(*given)[self.seen]
        if self.kind == "encoder-decoder":
            session.encode(*given)
            given = (self.tokens,)
        session.reset()
        if not self.single or len(given) > 1:
            return session.eval_all(*given)[self.seen]
        at = max(len(self.tokens) - self.single, 1)
        parts = [self.tokens[:at], *(self.tokens[i : i + 1] for i in range(at, len(self.tokens)))]
        return np.concatenate([session.eval_all(part) for part in parts])

    def reference_rows(self, reference: Reference) -> np.ndarray:
        """The rows float32 (visible, features) of onnxruntime."""
        if self.kind == "encoder-decoder":
            return reference.rows(self.tokens, self.masked, self.mask)
        return reference.rows(self.masked, mask=self.mask)[self.seen]


def make_cases(
    tokens: Tokens | None,
    info: dict[str, Any],
    window: int,
    windows: int | None = None,
    *,
    least: int = 1,
    where: str | None = None,
) -> list[Case]:
    """Windows of ``tokens``, or of random ones, for a model that ``info`` describes.

    Each has at most ``window`` tokens, and no more than the model holds; rows of tokens (windows,
    n) are cut each by itself. A decoder's windows leave out the last token of a row, which only
    follows, and a rest that is no whole window. ``least``: tokens that a window has at least, where
    the file computes something else for fewer. ``where``: what errors name. Raises SlmError where a
    token is out of the vocabulary, or they are too few.
    """
    for name, value in (("window", window), ("windows", windows)):
        if value is not None and value < 1:
            raise SlmError(f"must be at least 1, not {value}", where=name)
    kind = info["kind"]
    window = min(max(window, least), int(info["context"]))
    if kind == "encoder-decoder":  # each window is its own source
        window = min(window, int(info["source_context"]))
    count = max(_RANDOM_TOKENS, least + 1)
    rows = [random_tokens(info, count)] if tokens is None else _rows(tokens, info, where)
    cases: list[Case] = []
    for row in rows:
        cases += _encoder_cases(row, window) if kind == "encoder" else _cases(row, window, kind)
    cases = [ended(case, info) for case in cases if len(case.tokens) >= least]
    if not cases:
        least += kind != "encoder"
        count = max(map(len, rows), default=0)
        raise SlmError(
            f"verification needs at least {least} token{'s' * (least > 1)}, the text has {count}",
            where=where,
        )
    return cases[:windows]


def ended(case: Case, info: dict[str, Any]) -> Case:
    """``case`` with the token at its end that every sequence must have there, where one must."""
    final = info.get("final_token")
    if final is None or case.kind != "encoder":
        return case
    tokens = np.append(case.tokens[:-1], np.int32(final)).astype(np.int32)
    return replace(case, tokens=tokens, following=tokens)


def masked_cases(case: Case, info: dict[str, Any]) -> list[Case]:
    """``case`` under some masks, where the bundle takes any: left-padded, with holes, and both.

    The last token is visible. Where positions do not count padding, hidden tokens are that.
    """
    count, kind = len(case.tokens), info.get("mask", "none")
    if kind == "none":
        return []
    visible = np.random.default_rng(_SEED).random(count) >= _HIDDEN
    padded = np.arange(count) >= int(_HIDDEN * count)
    visible[-1] = padded[-1] = True
    pads = info.get("padding", ()) if kind == "skip" else ()
    padding = pads[0] if pads else None
    masks = (padded, visible, padded & visible)
    return [replace(case, mask=mask, padding=padding) for mask in masks]


def random_tokens(info: dict[str, Any], count: int) -> np.ndarray:
    """Random tokens, none of them padding: files count positions without it, bundles do not."""
    usual = np.setdiff1d(np.arange(info["vocab_size"]), info.get("padding", ()))
    return usual[np.random.default_rng(_SEED).integers(0, len(usual), count)].astype(np.int32)


def _rows(tokens: Tokens, info: dict[str, Any], where: str | None) -> list[np.ndarray]:
    ids = np.asarray(tokens)
    if ids.size == 0:
        return []
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise SlmError(
            f"tokens must be whole numbers (n,) or (windows, n), not {ids.dtype} {ids.shape}",
            where=where,
        )
    count = int(info["vocab_size"])
    outside = ids[(ids < 0) | (ids >= count)]
    if outside.size:
        raise SlmError(
            f"token {outside.flat[0]} is out of the vocabulary, which has 0 to {count - 1}: was "
            "the bundle compiled for this tokenizer?",
            where=where,
        )
    return list(np.atleast_2d(ids).astype(np.int32))


def _encoder_cases(row: np.ndarray, window: int) -> list[Case]:
    parts = (row[start : start + window] for start in range(0, len(row), window))
    return [Case(part, part, "encoder") for part in parts]


def _cases(row: np.ndarray, window: int, kind: str) -> list[Case]:
    window = min(window, len(row) - 1)
    if window < 1:
        return []
    starts = range(0, (len(row) - 1) // window * window, window)
    pairs = ((row[at : at + window], row[at + 1 : at + 1 + window]) for at in starts)
    return [Case(tokens, following, kind) for tokens, following in pairs]
