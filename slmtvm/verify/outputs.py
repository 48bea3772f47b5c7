"""Every output of a bundle against onnxruntime's, each by what it is for.

Numbers that become probabilities, of labels or of the places where an answer starts and ends, are
compared by their KL divergence and by the likeliest; embeddings and hidden states by the cosine
between rows; a single number by the cosine between all of them, one for each text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmtvm.errors import AccuracyError, SlmError
from slmtvm.verify.agreement import SAME, Limits, finite
from slmtvm.verify.cases import Runner
from slmtvm.verify.metrics import log_softmax
from slmtvm.verify.reference import Reference
from slmtvm.verify.stability import variants

_SCORES = ("logits", "score", "start_logits", "end_logits")
_SECOND = 2  # a text whose tokens are of two segments has half of them in each

Progress = Callable[[int, int], None]


@dataclass
class OutputDifference:
    """How far an output is from onnxruntime's; KL(reference || bundle) in nats."""

    name: str
    features: int
    pooled: bool
    max_abs: float = 0.0
    rows: int = 0
    sum_abs: float = 0.0
    values: int = 0
    sum_kl: float = 0.0
    same_top1: int = 0
    sum_cosine: float = 0.0
    numbers: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list, repr=False)

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Take in the rows of one text, float32 (n, features) of each."""
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        self.max_abs = max(self.max_abs, float(np.abs(a - b).max()))
        self.sum_abs += float(np.abs(a - b).sum())
        self.values += a.size
        if self._scores_places:
            a, b = a.T, b.T
        self.rows += len(a)
        if self.features == 1 and not self._scores_places:
            self.numbers.append((a, b))
        elif self._is_scores:
            p, q = log_softmax(b), log_softmax(a)
            self.sum_kl += float((np.exp(p) * (p - q)).sum())
            self.same_top1 += int((a.argmax(-1) == b.argmax(-1)).sum())
        else:
            self.sum_cosine += float(_cosines(a, b).sum())

    @property
    def _is_scores(self) -> bool:
        return self.name.startswith(_SCORES)

    @property
    def _scores_places(self) -> bool:
        """Whether one number for each token says which of them is the likeliest."""
        return self._is_scores and self.features == 1 and not self.pooled

    @property
    def kl_mean(self) -> float | None:
        """None for what is no scores."""
        return self.sum_kl / self.rows if self._is_scores and not self.numbers else None

    @property
    def cosine(self) -> float | None:
        """None for scores."""
        if self.numbers:
            a, b = (np.concatenate(side).reshape(1, -1) for side in zip(*self.numbers, strict=True))
            return float(_cosines(a, b)[0])
        return None if self._is_scores else self.sum_cosine / self.rows

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / self.values

    def excess(self, limits: Limits, own: Sequence[OutputDifference] = ()) -> list[str]:
        """What is beyond both its limit and ``own``, onnxruntime's differences from itself."""
        if (kl := self.kl_mean) is not None:
            most = max(limits.max_kl, *(SAME * (o.kl_mean or 0.0) for o in own), 0.0)
            return [] if kl <= most else [f"KL divergence {kl:.2g} nats (at most {most:.2g})"]
        cosine = math.nan if self.cosine is None else self.cosine
        least = min(limits.min_cosine, *(1 - SAME * (1 - (o.cosine or 0.0)) for o in own), 1.0)
        return [] if cosine >= least else [f"cosine {cosine:.4f} (at least {least:.4f})"]

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "rows": self.rows,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
        }
        if self.kl_mean is not None:
            said |= {"kl_mean": self.kl_mean, "top1": self.same_top1 / self.rows}
        else:
            said["cosine"] = self.cosine
        return {name: finite(value) for name, value in said.items()}

    def __str__(self) -> str:
        if self.kl_mean is not None:
            same = 100 * self.same_top1 / self.rows
            measure = f"KL divergence {self.kl_mean:.3g} nats, same likeliest {same:.2f} %"
        else:
            measure = f"cosine {self.cosine:.6f}"
        return f"{self.name}: {measure}, largest difference {self.max_abs:.3g}"


@dataclass(frozen=True)
class OutputsReport:
    """How far each output of a bundle is from onnxruntime's on the same file."""

    tokens: int
    outputs: tuple[OutputDifference, ...]
    masked: tuple[OutputDifference, ...] = ()  # under masks, where the bundle takes any
    rounded_layers: int = 0  # whose activations the bundle rounds to int8, but the file does not
    own: tuple[tuple[OutputDifference, ...], ...] = ()  # onnxruntime from itself, in several ways
    notes: tuple[str, ...] = ()  # what may be wrong with onnxruntime's numbers

    def to_json(self) -> dict[str, Any]:
        """The object that ``slmtvm verify --json`` writes."""
        said: dict[str, Any] = {
            "tokens": self.tokens,
            "rounded_layers": self.rounded_layers,
            "outputs": {o.name: o.to_json() for o in self.outputs},
        }
        if self.masked:
            said["masked"] = {o.name: o.to_json() for o in self.masked}
        if self.own:
            said["own"] = [{o.name: o.to_json() for o in way} for way in self.own]
        if self.notes:
            said["notes"] = list(self.notes)
        return said

    def excess(self, limits: Limits) -> list[str]:
        """What is beyond both its limit and onnxruntime's difference from itself, output by output;
        nothing where all agree."""
        found = []
        for index, output in enumerate((*self.outputs, *self.masked)):
            own = [way[index % len(self.outputs)] for way in self.own]
            under = ", under masks" if index >= len(self.outputs) else ""
            found += [f"{output.name}{under}: {part}" for part in output.excess(limits, own)]
        return found

    def agrees(self, limits: Limits | None = None) -> bool:
        """Whether every output stays within the limit of its measure, or as near as onnxruntime is
        to itself."""
        return not self.excess(limits or Limits())

    def __str__(self) -> str:
        lines = [f"tokens compared      {self.tokens}", *map(str, self.outputs)]
        if self.masked:
            lines += ["under masks, visible tokens:", *(f"  {o}" for o in self.masked)]
        if self.rounded_layers:
            lines.append(
                f"note: {self.rounded_layers} layers round activations to int8 where the file asks "
                "for float32; --activations file compiles what it asks for"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def needs_every_output(info: dict[str, Any]) -> bool:
    """Whether a bundle has more to compare than rows of logits or hidden states."""
    outputs = info.get("outputs") or [{"pooled": False, "features": info["vocab_size"]}]
    first = outputs[0]
    odd = info["kind"] != "encoder" and first["features"] != info["vocab_size"]
    return len(outputs) > 1 or bool(first["pooled"]) or odd


def compare_outputs(
    session: Runner,
    reference: Reference,
    texts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    progress: Progress = lambda _done, _all: None,
) -> tuple[OutputDifference, ...]:
    """Each output over ``texts``: tokens (n,) and, where some are hidden, a mask (n,).

    A decoder's are those after its last token. Raises AccuracyError where the file's output has
    another shape.
    """
    info = session.info
    total = [OutputDifference(o["name"], o["features"], o["pooled"]) for o in info["outputs"]]
    names = [o.name for o in total]
    encodes = info["kind"] == "encoder"
    for done, (tokens, mask) in enumerate(texts):
        progress(done, len(texts))
        segments = None
        if encodes and info.get("segments", 0) > 1:
            segments = (np.arange(len(tokens)) >= len(tokens) // _SECOND).astype(np.int32)
        if not encodes:
            session.reset()
        found = session.outputs(tokens, mask, segments)
        wanted = reference.run(tokens, names, mask=mask, segments=segments)
        if encodes and mask is not None and not mask[0] and not isinstance(session, _Variant):
            wanted = _of_first_visible(info, reference, wanted, tokens, mask, segments)
        for output, theirs, facts in zip(total, wanted, info["outputs"], strict=True):
            ours = found[output.name].reshape(-1, output.features)
            rows = _rows(theirs, output, reference)
            if not encodes:
                rows = rows[-1:]
            if ours.shape != rows.shape:
                raise AccuracyError(
                    f"its output {output.name!r} has shape {theirs.shape}, the bundle's has "
                    f"{ours.shape} rows: was the bundle compiled from another file?",
                    where=str(reference.path),
                )
            seen = slice(None) if mask is None or facts["pooled"] or not encodes else mask
            output.add(ours[seen], rows[seen])
    progress(len(texts), len(texts))
    return tuple(total)


def _of_first_visible(
    info: dict[str, Any],
    reference: Reference,
    wanted: list[np.ndarray],
    tokens: np.ndarray,
    mask: np.ndarray,
    segments: np.ndarray | None,
) -> list[np.ndarray]:
    """``wanted`` with what is pooled of the visible tokens alone, where hidden ones are left out:
    a bundle then takes the first of these where the file takes the row of padding."""
    if info.get("mask") != "skip":
        return wanted
    seen = None if segments is None else segments[mask]
    names = [output["name"] for output in info["outputs"]]
    alone = reference.run(tokens[mask], names, segments=seen)
    both = zip(info["outputs"], wanted, alone, strict=True)
    return [one if facts["pooled"] else theirs for facts, theirs, one in both]


def own_outputs(
    info: dict[str, Any],
    reference: Reference,
    texts: Sequence[tuple[np.ndarray, np.ndarray | None]],
) -> Iterator[tuple[OutputDifference, ...]]:
    """How far onnxruntime is from itself over ``texts``, in one way after another."""
    for make in variants(reference):
        try:
            yield compare_outputs(_Variant(info, make()), reference, texts)
        except SlmError:
            continue  # that a changed file does not run says nothing of the file


class _Variant:
    """onnxruntime in the place of a session."""

    def __init__(self, info: dict[str, Any], reference: Reference) -> None:
        self.info, self._reference = info, reference

    def reset(self) -> None:
        pass

    def outputs(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None = None,
        segments: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        names = [output["name"] for output in self.info["outputs"]]
        found = dict(
            zip(
                names,
                self._reference.run(tokens, names, mask=mask, segments=segments),
                strict=True,
            )
        )
        if self.info["kind"] == "encoder":
            return found
        features = {output["name"]: output["features"] for output in self.info["outputs"]}
        return {name: v.reshape(-1, features[name])[-1:] for name, v in found.items()}


def _rows(theirs: np.ndarray, output: OutputDifference, reference: Reference) -> np.ndarray:
    """The file's output of one sequence as (rows, features)."""
    if theirs.shape[:1] != (1,) or theirs.size % output.features:
        raise AccuracyError(
            f"its output {output.name!r} has shape {theirs.shape} for one sequence: was the bundle "
            "compiled from another file?",
            where=str(reference.path),
        )
    return np.asarray(theirs, np.float32).reshape(-1, output.features)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / norms)
