"""A bundle against onnxruntime on the ONNX file that it was compiled from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference
from slmtvm.verify.reference import Reference
from slmtvm.verify.report import VerifyReport

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 256  # tokens that are evaluated together, from position 0
_RANDOM_TOKENS = WINDOW + 1
_SEED = 0

Progress = Callable[[int, int], None]


class Evaluator(Protocol):
    """What verification needs of a session."""

    @property
    def info(self) -> dict[str, Any]: ...

    def reset(self) -> None: ...

    def eval_all(self, tokens: np.ndarray) -> np.ndarray: ...

    def encode(self, tokens: np.ndarray) -> np.ndarray: ...


def verify(
    bundle: str | Path,
    onnx_file: str | Path,
    *,
    text: str | None = None,
    tokens: Sequence[int] | np.ndarray | None = None,
    windows: int | None = None,
    window: int = WINDOW,
    threads: int = 1,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport:
    """Compare a bundle with onnxruntime on ``onnx_file``, window by window.

    Parameters
    ----------
    text, tokens: what to evaluate, at most one of them; text goes through the bundle's tokenizer.
        Without either, random tokens are compared and no perplexity is reported.
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
    reference = Reference(onnx_file, threads=threads)
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
) -> VerifyReport:
    """``verify`` for an open session; ``tokens`` None stands for random ones."""
    info = session.info
    is_text = tokens is not None
    reference.choose_output(info.get("output") or None)
    ids = _random_tokens(info) if tokens is None else np.asarray(tokens)
    window = min(window, int(info["context"]))
    rounded = int(info.get("rounded_layers", 0))
    if info["kind"] == "encoder":
        report = _compare_hidden(session, reference, _cut(ids, window)[:windows], progress)
        return replace(report, rounded_layers=rounded)
    if len(ids) < 2:
        raise SlmError(f"verification needs at least 2 tokens, the text has {len(ids)}")
    reads_source = info["kind"] == "encoder-decoder"
    if reads_source:  # each window is its own source
        window = min(window, int(info["source_context"]))
    window = min(window, len(ids) - 1)
    inputs = _cut(ids[: (len(ids) - 1) // window * window], window)[:windows]
    targets = _cut(ids[1:], window)
    report = _compare_logits(
        session, reference, inputs, targets, is_text, progress, reads_source=reads_source
    )
    return replace(report, rounded_layers=rounded)


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids int32 (n,) of the whole text, whatever padding the tokenizer is set to."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return np.array(tokenizer.encode(text).ids, np.int32)


def _random_tokens(info: dict[str, Any]) -> np.ndarray:
    """Random tokens, none of them padding: files count positions without it, bundles do not."""
    usual = np.setdiff1d(np.arange(info["vocab_size"]), info.get("padding", ()))
    return usual[np.random.default_rng(_SEED).integers(0, len(usual), _RANDOM_TOKENS)]


def _cut(ids: np.ndarray, window: int) -> list[np.ndarray]:
    ids = ids.astype(np.int32)
    return [ids[start : start + window] for start in range(0, len(ids), window)]


def _compare_logits(
    session: Evaluator,
    reference: Reference,
    inputs: list[np.ndarray],
    targets: list[np.ndarray],
    is_text: bool,
    progress: Progress,
    *,
    reads_source: bool,
) -> VerifyReport:
    total = LogitsDifference()
    for done, (ids, following) in enumerate(zip(inputs, targets, strict=False)):
        progress(done, len(inputs))
        if reads_source:
            session.encode(ids)
        session.reset()
        ours, theirs = session.eval_all(ids), reference.rows(ids, ids if reads_source else None)
        _check_shapes(ours, theirs, reference)
        total.add_logits(ours, theirs, following)
    progress(len(inputs), len(inputs))
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
    session: Evaluator, reference: Reference, inputs: list[np.ndarray], progress: Progress
) -> VerifyReport:
    total = HiddenDifference()
    for done, ids in enumerate(inputs):
        progress(done, len(inputs))
        ours, theirs = session.encode(ids), reference.rows(ids)
        _check_shapes(ours, theirs, reference)
        total.add_hidden(ours, theirs)
    progress(len(inputs), len(inputs))
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
