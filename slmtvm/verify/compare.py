"""A bundle against onnxruntime on the ONNX file that it was compiled from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from slmtvm.bundle.read import Bundle
from slmtvm.errors import AccuracyError
from slmtvm.rpc.device_bundle import Place, on_device
from slmtvm.runtime import load
from slmtvm.runtime.session import Session, tokenizer_of
from slmtvm.verify.agreement import Figures, Limits
from slmtvm.verify.cases import Case, Evaluator, Tokens, make_cases, masked_cases
from slmtvm.verify.exits import compare_exits
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference
from slmtvm.verify.on_device import DeviceSession
from slmtvm.verify.outputs import (
    OutputsReport,
    compare_outputs,
    needs_every_output,
    own_outputs,
)
from slmtvm.verify.reference import Reference
from slmtvm.verify.report import VerifyReport
from slmtvm.verify.stability import own_difference
from slmtvm.verify.token_files import encode_text

WINDOW = 256  # tokens that are evaluated together, from position 0
_SHORT_WINDOW = 32  # random tokens that are a text of their own, where outputs are of whole texts
_CACHE_SHAPE = ("layers", "num_kv_heads", "head_dim")
_FLOAT32_BYTES = 4
_OWN_WINDOWS = 4  # that onnxruntime is compared with itself on

Progress = Callable[[int, int], None]


def verify(
    bundle: str | Path,
    onnx_file: str | Path,
    *,
    encoder: str | Path | None = None,
    text: str | None = None,
    tokens: Tokens | None = None,
    windows: int | None = None,
    window: int = WINDOW,
    threads: int = 1,
    float_file: str | Path | None = None,
    limits: Limits | None = None,
    place: Place | None = None,
    target: str | None = None,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport | OutputsReport:
    """Compare a bundle with onnxruntime on ``onnx_file``, window by window.

    Parameters
    ----------
    encoder: the ONNX file of the encoder that ``onnx_file`` reads; the one beside it where None.
    text, tokens: what to evaluate, at most one of them; text goes through the bundle's tokenizer,
        tokens are (n,) or (windows, n). Without either, random tokens are compared and no
        perplexity is reported. A bundle that takes masks is compared under some random ones as
        well, on visible tokens.
    windows: the first so many windows only.
    window: tokens in a window; each starts at position 0 and nothing is carried over. The
        perplexity counts the token after each of these.
    threads: of both sides.
    float_file: the model before it was quantized: how far both are from it is in the report.
    limits: beyond which onnxruntime's difference from itself is measured with more care.
    place: where the bundle is to be evaluated on a device; onnxruntime runs here all the same.
    target: which of the bundle's libraries; the best for the machine where None.
    progress: called with windows done and all windows.

    Raises SlmError where one of the files cannot be used, the tokens are too few or out of the
    vocabulary, no device is to be had.
    """
    if text is not None and tokens is not None:
        raise ValueError("give text or tokens, not both")
    reference = Reference(onnx_file, threads=threads, encoder=encoder)
    float_reference = None if float_file is None else Reference(float_file, threads=threads)
    if text is not None:
        tokens = encode_text(tokenizer_of(Bundle.open(bundle)), text)
    with _session(bundle, threads, target, place) as session:
        return compare(
            session,
            reference,
            tokens,
            windows=windows,
            window=window,
            float_reference=float_reference,
            limits=limits,
            with_own=True,
            progress=progress,
        )


@contextmanager
def _session(
    bundle: str | Path, threads: int, target: str | None, place: Place | None
) -> Iterator[Evaluator]:
    if place is None:
        with load(bundle, threads=threads, target=target) as session:
            yield session
        return
    with on_device(place, bundle, target) as there:
        yield DeviceSession(there, threads)


def compare(
    session: Evaluator,
    reference: Reference,
    tokens: Tokens | None = None,
    *,
    windows: int | None = None,
    window: int = WINDOW,
    float_reference: Reference | None = None,
    limits: Limits | None = None,
    with_own: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport | OutputsReport:
    """``verify`` for an open session; ``tokens`` None stands for random ones.

    with_own: measure onnxruntime's difference from itself even where the limits are kept.
    """
    info = session.info
    if needs_every_output(info) and tokens is None:
        window = min(window, _SHORT_WINDOW)
    cases = make_cases(tokens, info, window, windows, least=shortest(info, reference))
    report = compare_cases(
        session, reference, cases, limits=limits, with_own=with_own, progress=progress
    )
    if isinstance(report, OutputsReport):
        return report
    if isinstance(session, Session):
        report = replace(report, exits=compare_exits(session, cases))
    if float_reference is not None:
        report = _with_float(report, session, reference, float_reference, cases)
    return replace(report, ppl=None, ppl_reference=None) if tokens is None else report


def compare_cases(
    session: Evaluator,
    reference: Reference,
    cases: Sequence[Case],
    *,
    limits: Limits | None = None,
    with_own: bool = False,
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport | OutputsReport:
    """The report on ``cases``, and on the first of them under masks where the model takes any."""
    limits = limits or Limits()
    outputs = session.info.get("outputs", ())
    reference.choose_output(outputs[0]["name"] if outputs else None)
    if needs_every_output(session.info):
        return _compare_outputs(session, reference, cases, limits, with_own, progress)
    half = _has_half_cache(session)
    report = _compare(session, reference, cases, progress)
    report = _judged(report, reference, cases, limits, with_own=with_own, half=half)
    masked = masked_cases(cases[0], session.info)
    if masked:
        under = _compare(session, reference, masked)
        under = _judged(under, reference, masked, limits, with_own=False, half=half)
        report = replace(report, masked=under)
    rounded = int(session.info.get("rounded_layers", 0))
    return replace(report, rounded_layers=rounded, notes=reference.doubts)


def shortest(info: dict[str, Any], reference: Reference) -> int:
    """Tokens below which the file computes something else than was compiled."""
    least = int(info.get("exact_from", 1))
    if info["kind"] == "encoder" and not reference.takes_mask:
        least = max(least, reference.fixed_length)  # padding would be seen
    return min(least, int(info["context"]))


def _compare_outputs(
    session: Evaluator,
    reference: Reference,
    cases: Sequence[Case],
    limits: Limits,
    with_own: bool,
    progress: Progress,
) -> OutputsReport:
    texts = [(case.tokens, None) for case in cases]
    masked = [(case.masked, case.mask) for case in masked_cases(cases[0], session.info)]
    report = OutputsReport(
        tokens=sum(len(case.tokens) for case in cases),
        outputs=compare_outputs(session, reference, texts, progress),
        masked=compare_outputs(session, reference, masked) if masked else (),
        rounded_layers=int(session.info.get("rounded_layers", 0)),
        notes=reference.doubts,
    )
    if not (with_own or report.excess(limits)):
        return report
    for own in own_outputs(session.info, reference, [*texts, *masked][: _OWN_WINDOWS + 1]):
        report = replace(report, own=(*report.own, own))
        if not report.excess(limits):
            break
    return report


def _judged(
    report: VerifyReport,
    reference: Reference,
    cases: Sequence[Case],
    limits: Limits,
    *,
    with_own: bool,
    half: bool,
) -> VerifyReport:
    """``report`` with onnxruntime's own difference, where that is asked for or decides."""
    if not (with_own or report.excess(limits)):
        return report

    def enough(own: Figures) -> bool:
        return not report.excess(limits, own)

    own = own_difference(reference, cases[:_OWN_WINDOWS], _figures, enough, half=half)
    return replace(report, own=own)


def _has_half_cache(session: Evaluator) -> bool:
    """Whether keys and values are rounded, to float16 or more."""
    info = session.info
    values = 2 * math.prod(int(info.get(name, 0)) for name in _CACHE_SHAPE)
    return 0 < int(info.get("kv_bytes_per_token", 0)) < values * _FLOAT32_BYTES


def _compare(
    session: Evaluator,
    reference: Reference,
    cases: Sequence[Case],
    progress: Progress = lambda _done, _all: None,
) -> VerifyReport:
    total = _difference(cases)
    for done, case in enumerate(cases):
        progress(done, len(cases))
        ours, theirs = case.session_rows(session), case.reference_rows(reference)
        if ours.shape != theirs.shape:
            raise AccuracyError(
                f"its output has shape {theirs.shape}, the bundle's has {ours.shape}: "
                "was the bundle compiled from another file?",
                where=str(reference.path),
            )
        _add(total, ours, theirs, case)
    progress(len(cases), len(cases))
    report = VerifyReport(**asdict(total.figures()))
    if isinstance(total, HiddenDifference):
        return report
    return replace(
        report,
        ppl=float(np.exp(total.nll / total.rows)),
        ppl_reference=float(np.exp(total.nll_reference / total.rows)),
    )


def _with_float(
    report: VerifyReport,
    session: Evaluator,
    reference: Reference,
    float_reference: Reference,
    cases: Sequence[Case],
) -> VerifyReport:
    float_reference.choose_output(reference.output)
    wanted = [case.reference_rows(float_reference) for case in cases]
    return replace(
        report,
        from_float=_figures([case.session_rows(session) for case in cases], wanted, cases),
        reference_from_float=_figures(
            [case.reference_rows(reference) for case in cases], wanted, cases
        ),
    )


def _figures(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], cases: Sequence[Case]
) -> Figures:
    total = _difference(cases)
    for a, b, case in zip(ours, theirs, cases, strict=True):
        _add(total, a, b, case)
    return total.figures()


def _difference(cases: Sequence[Case]) -> LogitsDifference | HiddenDifference:
    return HiddenDifference() if cases[0].kind == "encoder" else LogitsDifference()


def _add(
    total: LogitsDifference | HiddenDifference, ours: np.ndarray, theirs: np.ndarray, case: Case
) -> None:
    if isinstance(total, LogitsDifference):
        total.add_logits(ours, theirs, case.following[case.seen])
    else:
        total.add_hidden(ours, theirs)
