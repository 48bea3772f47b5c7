"""A bundle against onnxruntime on the ONNX file that it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference
from slmtvm.verify.outputs import OutputsReport, compare_outputs, needs_every_output
from slmtvm.verify.reference import Reference
from slmtvm.verify.report import VerifyReport

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 256  # tokens that are evaluated together, from position 0
_RANDOM_TOKENS = WINDOW + 1
_SHORT_WINDOW = 32  # random tokens that are a text of their own, where outputs are of whole texts
_SEED = 0
_HIDDEN = 0.25  # of the tokens of a masked window

Progress = Callable[[int, int], None]


class Evaluator(Protocol):
    """What verification needs of a session."""

    @property
    def info(self) -> dict[str, Any]: ...

    def reset(self) -> None: ...

    def eval_all(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...

    def encode(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray: ...

    def outputs(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None = None,
        segments: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class _Case:
    """A window's ``tokens`` (n,), those that follow them, and which of them are visible."""

    tokens: np.ndarray
    following: np.ndarray
    mask: np.ndarray | None = None  # of the source where there is one; None: all are
    padding: int | None = None  # what hidden tokens are instead, where that matters

    @property
    def masked(self) -> np.ndarray:
        """The tokens int32 (n,) that go with the mask."""
        if self.mask is None or self.padding is None:
            return self.tokens
        return np.where(self.mask, self.tokens, self.padding).astype(np.int32)

    @property
    def given(self) -> tuple[np.ndarray, ...]:
        """The arguments of a session's call."""
        return (self.masked,) if self.mask is None else (self.masked, self.mask)


def verify(
    bundle: str | Path,
    onnx_file: str | Path,
    *,
    encoder: str | Path | None = None,
    text: str | None = None,
    tokens: Sequence[int] | np.ndarray | None = None,
    windows: int | None = None,
    window: int = WINDOW,
    threads: int = 1,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport | OutputsReport:
    """Compare a bundle with onnxruntime on ``onnx_file``, window by window.

    Parameters
    ----------
    encoder: the ONNX file of the encoder that ``onnx_file`` reads; the one beside it where None.
    text, tokens: what to evaluate, at most one of them; text goes through the bundle's tokenizer.
        Without either, random tokens are compared and no perplexity is reported.
        A bundle that takes masks is compared under some random ones as well, on visible tokens.
    windows: the first so many windows only.
    window: tokens in a window; each starts at position 0 and nothing is carried over. The
        perplexity counts the token after each of these.
    threads: of both sides.
    progress: called with windows done and all windows.

    Raises SlmError where one of the files cannot be used or the tokens are too few.
    """
    from slmtvm.runtime import load

    if text is not None and tokens is not None:
        raise ValueError("give text or tokens, not both")
    reference = Reference(onnx_file, threads=threads, encoder=encoder)
    with load(bundle, threads=threads) as session:
        if text is not None:
            tokens = encode_text(session.tokenizer, text)
        return compare(
            session, reference, tokens, windows=windows, window=window, progress=progress
        )


def compare(
    session: Evaluator,
    reference: Reference,
    tokens: Sequence[int] | np.ndarray | None = None,
    *,
    windows: int | None = None,
    window: int = WINDOW,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport | OutputsReport:
    """``verify`` for an open session; ``tokens`` None stands for random ones."""
    info = session.info
    is_text = tokens is not None
    outputs = info.get("outputs", ())
    reference.choose_output(outputs[0]["name"] if outputs else None)
    # For shorter sequences the file may compute something else than was compiled.
    least = int(info.get("exact_from", 1))
    if info["kind"] == "encoder" and not reference.takes_mask:
        least = max(least, reference.fixed_length)  # padding would be seen
    window = min(max(window, least), int(info["context"]))
    count = max(_RANDOM_TOKENS, window + 1)
    ids = _random_tokens(info, count) if tokens is None else np.asarray(tokens)
    rounded = int(info.get("rounded_layers", 0))
    if needs_every_output(info):
        short = window if is_text else min(window, _SHORT_WINDOW)
        return _compare_outputs(session, reference, _cut(ids, short)[:windows], progress)
    if info["kind"] == "encoder":
        parts = [part for part in _cut(ids, window) if len(part) >= least][:windows]
        _check_count(len(ids), least)
        cases = [_Case(part, part) for part in parts]
        report = _compare_hidden(session, reference, cases, progress)
        masked = _masked_cases(cases[0], info)
        under = _compare_hidden(session, reference, masked) if masked else None
        return replace(report, rounded_layers=rounded, masked=under)
    _check_count(len(ids), least + 1)
    if info["kind"] == "encoder-decoder":  # each window is its own source
        window = min(window, int(info["source_context"]))
    window = min(window, len(ids) - 1)
    inputs = _cut(ids[: (len(ids) - 1) // window * window], window)[:windows]
    targets = _cut(ids[1:], window)
    cases = [_Case(*pair) for pair in zip(inputs, targets, strict=False)]
    report = _compare_logits(session, reference, cases, is_text, progress)
    masked = _masked_cases(cases[0], info)
    under = _compare_logits(session, reference, masked, False) if masked else None
    return replace(report, rounded_layers=rounded, masked=under)


def _check_count(count: int, needed: int) -> None:
    if count < needed:
        raise SlmError(f"verification needs at least {needed} tokens, the text has {count}")


def _compare_outputs(
    session: Evaluator, reference: Reference, texts: list[np.ndarray], progress: Progress
) -> OutputsReport:
    info = session.info
    masked = [(case.masked, case.mask) for case in _masked_cases(_Case(texts[0], texts[0]), info)]
    return OutputsReport(
        tokens=sum(map(len, texts)),
        outputs=compare_outputs(session, reference, [(t, None) for t in texts], progress),
        masked=compare_outputs(session, reference, masked) if masked else (),
        rounded_layers=int(info.get("rounded_layers", 0)),
    )


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids int32 (n,) of the whole text, whatever padding the tokenizer is set to."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return np.array(tokenizer.encode(text).ids, np.int32)


def _random_tokens(info: dict[str, Any], count: int) -> np.ndarray:
    """Random tokens, none of them padding: files count positions without it, bundles do not."""
    usual = np.setdiff1d(np.arange(info["vocab_size"]), info.get("padding", ()))
    return usual[np.random.default_rng(_SEED).integers(0, len(usual), count)]


def _masked_cases(case: _Case, info: dict[str, Any]) -> list[_Case]:
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


def _cut(ids: np.ndarray, window: int) -> list[np.ndarray]:
    ids = ids.astype(np.int32)
    return [ids[start : start + window] for start in range(0, len(ids), window)]


def _compare_logits(
    session: Evaluator,
    reference: Reference,
    cases: list[_Case],
    is_text: bool,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport:
    total = LogitsDifference()
    reads_source = session.info["kind"] == "encoder-decoder"
    for done, case in enumerate(cases):
        progress(done, len(cases))
        seen: np.ndarray | slice = slice(None)
        if reads_source:  # which is masked, and not the text
            session.encode(*case.given)
            session.reset()
            ours = session.eval_all(case.tokens)
            theirs = reference.rows(case.tokens, case.masked, case.mask)
        else:
            session.reset()
            ours = session.eval_all(*case.given)
            theirs = reference.rows(case.masked, mask=case.mask)
            seen = seen if case.mask is None else case.mask
        _check_shapes(ours, theirs, reference)
        total.add_logits(ours[seen], theirs[seen], case.following[seen])
    progress(len(cases), len(cases))
    return VerifyReport(
        kind="decoder",
        tokens=total.rows,
        max_abs=total.max_abs,
        mean_abs=total.mean_abs,
        kl_mean=total.sum_kl / total.rows,
        top1=total.same_top1 / total.rows,
        ppl=float(np.exp(total.nll / total.rows)) if is_text else None,
        ppl_reference=float(np.exp(total.nll_reference / total.rows)) if is_text else None,
    )


def _compare_hidden(
    session: Evaluator,
    reference: Reference,
    cases: list[_Case],
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport:
    total = HiddenDifference()
    for done, case in enumerate(cases):
        progress(done, len(cases))
        ours, theirs = session.encode(*case.given), reference.rows(case.masked, mask=case.mask)
        _check_shapes(ours, theirs, reference)
        seen = slice(None) if case.mask is None else case.mask
        total.add_hidden(ours[seen], theirs[seen])
    progress(len(cases), len(cases))
    return VerifyReport(
        kind="encoder",
        tokens=total.rows,
        max_abs=total.max_abs,
        mean_abs=total.mean_abs,
        cosine=total.sum_cosine / total.rows,
    )


def _check_shapes(ours: np.ndarray, theirs: np.ndarray, reference: Reference) -> None:
    if ours.shape != theirs.shape:
        raise InvalidModelError(
            f"its output has shape {theirs.shape}, the bundle's has {ours.shape}: "
            "was the bundle compiled from another file?",
            where=str(reference.path),
        )
