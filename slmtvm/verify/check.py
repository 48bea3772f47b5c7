"""The net under the compiler: what it made, against onnxruntime, before anyone uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from slmtvm.errors import (
    AccuracyError,
    BundleError,
    InvalidModelError,
    SlmError,
    UnsupportedOpError,
)
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.probing import probing_tokens
from slmtvm.runtime import load
from slmtvm.verify.agreement import Limits, worst
from slmtvm.verify.cases import Case, Tokens, ended, make_cases
from slmtvm.verify.compare import WINDOW, compare_cases, shortest
from slmtvm.verify.outputs import OutputsReport
from slmtvm.verify.reference import Reference, file_bytes
from slmtvm.verify.report import VerifyReport, summary
from slmtvm.verify.token_files import encode_text, read_ids, read_text

CHECK_TOKENS = 64
_ENCODER_WINDOWS = (47, 17)  # no length that kernels are made for: rows are padded
_MOST_TOKENS = 1024  # of a file that are taken
_SINGLE = 8  # tokens that a decoder takes one by one, after the others at once
_MEMORY = 2.5  # times the bytes of its file that onnxruntime takes: read, and laid out for kernels
# Below these a figure of the manifest is 0: floats added up in another order, by another CPU.
_LEAST_KL, _LEAST_RELATIVE, _COSINE_DIGITS = 1e-6, 1e-5, 5


class Check:
    """A model's ONNX file and the tokens that bundles of it are compared with onnxruntime on.

    ``record`` afterwards: what the manifest says of it, JSON values. Figures have two digits, and
    are those of one onnxruntime on one CPU.
    """

    def __init__(
        self, model: CanonicalModel, cases: Sequence[Case], encoder: str | Path | None = None
    ) -> None:
        self._model, self._cases, self._encoder = model, cases, encoder
        self._reports: list[VerifyReport | OutputsReport] = []
        self._reason = ""
        self._reference: Reference | None = None

    def compare(self, bundle: Path, target: str) -> None:
        """Compare a bundle's library for ``target``, which this machine must be able to run.

        Raises AccuracyError where it differs by more than ``verify`` allows and onnxruntime from
        itself. Where onnxruntime cannot run the file there is nothing to compare with.
        """
        if self._reason:
            return
        try:
            reference = self._reference = self._reference or self._open()
        except (InvalidModelError, UnsupportedOpError, _CannotCheckError) as error:
            self.skip(str(error))
            return
        try:
            session = load(bundle, target=target, check=False)
        except BundleError as error:  # such as a folder that nothing may be executed from
            self.skip(str(error).replace(str(bundle), bundle.name))
            return
        with session:
            try:
                cases = self._long_enough(shortest(session.info, reference))
                report = compare_cases(session, reference, cases)
            except (InvalidModelError, UnsupportedOpError) as error:
                self.skip(str(error))
                return
        excess = report.excess(Limits())
        if excess and report.notes:
            self.skip(report.notes[0])
        elif excess:
            kv = str(session.info.get("kv", ""))
            lower = bool(session.info.get("kv_ranks"))
            raise AccuracyError(_message(report, excess, kv, lower), where=str(self._model.source))
        self._reports.append(report)

    def skip(self, reason: str) -> None:
        """Note why nothing is compared."""
        self._reason = " ".join(reason.removeprefix(f"{self._model.source}: ").split())

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of the check."""
        if self._reason:
            return {"skipped": self._reason}
        table: dict[str, Any] = {
            "tokens": max(report.tokens for report in self._reports),
            "onnxruntime": onnxruntime.__version__,
        }
        rows = [r for r in self._reports if isinstance(r, VerifyReport)]
        several = [r for r in self._reports if isinstance(r, OutputsReport)]
        if rows:
            figures = worst([part for r in rows for part in (r, r.masked) if part is not None])
            table["cosine"] = round(figures.cosine, _COSINE_DIGITS)
            table["relative"] = _two_digits(figures.relative, _LEAST_RELATIVE)
            if figures.kl_mean is not None:
                table["kl"] = _two_digits(figures.kl_mean, _LEAST_KL)
        every = [o for r in several for o in (*r.outputs, *r.masked)]
        cosines = [o.cosine for o in every if o.cosine is not None]
        divergences = [o.kl_mean for o in every if o.kl_mean is not None]
        if cosines:
            table["cosine"] = round(min(cosines), _COSINE_DIGITS)
        if divergences:
            table["kl"] = _two_digits(max(divergences), _LEAST_KL)
        return table

    def _long_enough(self, least: int) -> Sequence[Case]:
        """The cases, or where the file computes something else for shorter ones, one of all tokens
        that is repeated to ``least``."""
        if all(len(case.tokens) >= least for case in self._cases):
            return self._cases
        ids = np.resize(np.concatenate([case.tokens for case in self._cases]), least)
        return [Case(ids, np.roll(ids, -1), self._model.kind)]

    def _open(self) -> Reference:
        needed, there = _MEMORY * file_bytes(self._model.source), _available_memory()
        if there is not None and needed > there:
            raise _CannotCheckError(
                f"onnxruntime needs about {needed / 1e9:.1f} GB of memory for this file, "
                f"{there / 1e9:.1f} GB are free"
            )
        try:
            return Reference(self._model.source, encoder=self._encoder)
        except MemoryError as error:
            raise _CannotCheckError("onnxruntime ran out of memory") from error


class _CannotCheckError(Exception):
    """Why there is nothing to compare with, where that is no fault of the file."""


def prepare_check(
    model: CanonicalModel,
    tokens: str | Path | Tokens | None = None,
    tokenizer: bytes | None = None,
    encoder: str | Path | None = None,
) -> Check:
    """The check of bundles of ``model``, on ``tokens`` or on some that are likely to show faults.

    tokens: ids (n,) or (windows, n), or a file: a text, read with ``tokenizer``, the content of a
    tokenizer.json, or ids in a .npy. encoder: the file of an encoder that is not beside the model.
    Raises SlmError where they cannot be read or are not of the model's vocabulary.
    """
    if tokens is not None:
        return Check(model, _given_cases(model, tokens, tokenizer), encoder)
    count = min(CHECK_TOKENS, model.context)
    if model.kind == "encoder-decoder":
        count = min(count, model.source_context)
    ids = probing_tokens(model, count)
    if model.kind != "encoder":
        cases = [Case(ids, np.roll(ids, -1), model.kind, single=_SINGLE)]
        return Check(model, cases, encoder)
    first = min(_ENCODER_WINDOWS[0], count)
    parts = [part for part in (ids[:first], ids[first:]) if len(part)]
    info = {"final_token": model.final_token}
    return Check(model, [ended(Case(part, part, model.kind), info) for part in parts])


def check_line(record: dict[str, Any]) -> str:
    """One line for people of a manifest's record."""
    if reason := record.get("skipped"):
        return f"not checked: {reason}"
    if "kl" in record:
        least = f"under {_short(_LEAST_KL)}"
        figure = f"KL {_short(record['kl']) if record['kl'] else least}"
    else:
        figure = f"cosine {record['cosine']:.{_COSINE_DIGITS}f}"
    return f"checked: {figure} over {record['tokens']} tokens"


def _given_cases(
    model: CanonicalModel, tokens: str | Path | Tokens, tokenizer: bytes | None
) -> list[Case]:
    where = None
    if isinstance(tokens, str | Path):
        path = Path(tokens)
        where, tokens = str(path), _read(path, tokenizer)
    info = {
        "kind": model.kind,
        "context": model.context,
        "source_context": model.source_context,
        "vocab_size": model.vocab_size,
        "final_token": model.final_token,
    }
    ids = np.asarray(tokens)
    if ids.ndim == 1:
        ids = ids[: _MOST_TOKENS + 1]
    cases, most = make_cases(ids, info, WINDOW, where=where), _MOST_TOKENS
    taken: list[Case] = []
    for case in cases:
        if most <= 0:
            break
        taken.append(case)
        most -= len(case.tokens)
    return taken


def _read(path: Path, tokenizer: bytes | None) -> np.ndarray:
    if path.suffix == ".npy":
        return read_ids(path)
    text = read_text(path)
    if tokenizer is None:
        raise SlmError(
            "there is no tokenizer to read this text with; name one with --tokenizer, or give "
            "token ids in a .npy file",
            where=str(path),
        )
    return encode_text(Tokenizer.from_buffer(tokenizer), text)


def _message(report: VerifyReport | OutputsReport, excess: list[str], kv: str, lower: bool) -> str:
    tokens, own = report.tokens, ""
    if isinstance(report, VerifyReport) and report.own is not None:
        own = f" (onnxruntime from itself: {summary(report.own)})"
    rounded = (
        f"; {report.rounded_layers} layers round activations to int8 where the file does not: "
        "perhaps --activations file helps"
        if report.rounded_layers
        else ""
    )
    if kv in ("int8", "int4"):
        rounded += f"; the cache holds keys and values in {kv}: --kv f16 is nearer"
    if lower:
        rounded += "; the cache keeps keys and values at a lower rank: a higher one is nearer"
    return (
        f"the compiled model differs from onnxruntime over {tokens} tokens: "
        f"{', '.join(excess)}{own}{rounded}. No bundle was written; --no-check writes it all the "
        "same. If the file is right, please report it with what `slmtvm inspect --report FILE` "
        "writes"
    )


def _two_digits(value: float, least: float) -> float:
    return float(f"{value:.1e}") if value >= least else 0.0


def _short(value: float) -> str:
    """2e-4 for 0.00021."""
    digits, _, exponent = f"{value:.0e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _available_memory() -> int | None:
    """Bytes that the system can give without swapping; None where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
