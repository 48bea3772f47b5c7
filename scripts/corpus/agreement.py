"""When a compiled model counts as the same as onnxruntime's: a rule by the file's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from corpus.inputs import LENGTHS
from slmtvm.ir.model import Output
from slmtvm.verify.widening import computes_in

INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
_ROUNDS_ACTIVATIONS = {
    "MatMulInteger", "QLinearMatMul", "QGemm", "QOrderedMatMul", "MatMulIntegerToFloat",
}  # fmt: skip
_ROUNDS_BY_CALL = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QAttention"}


@dataclass(frozen=True)
class Rule:
    """``most``: largest difference relative to the logits' range. ``single``: that of the median
    over sequences of one token, where a rounding flips rarely. ``cosine``: the least between rows,
    with the same likeliest token. What is None is not asked for; ``most`` alone is enough."""

    name: str
    lengths: tuple[int, ...] = LENGTHS  # of the sequences that are compared
    stepwise: bool = False  # whether rows of a call are rounded together
    most: float | None = None
    single: float | None = None
    cosine: float | None = None


EXACT = Rule("exact", most=2e-4)
# Activations rounded in blocks, as onnxruntime does it at accuracy level 4: a last bit of a float
# that decides a rounding moves every later row.
BLOCKS = Rule("int8 activations in blocks", most=1e-3, single=1e-3, cosine=0.999)
# One rounding step of a tensor is amplified by the layers after it. Not for a single token:
# onnxruntime 1.31 has another result for one row of its integer operators than for that row among
# others, far from what the float model computes.
ROUNDED = Rule("rounded activations", lengths=(2, 2, 3, 5, LENGTHS[-1]), cosine=0.999)
DYNAMIC = Rule("activations rounded by call", stepwise=True, single=1e-3, cosine=0.999)
# onnxruntime computes in 11 bits of mantissa, this compiler in float32.
HALF = Rule("half precision", cosine=0.999)
# onnxruntime does not compute in 8 bits of mantissa: it is given the same numbers in float32.
WIDENED = Rule("bfloat16 computed in float32", most=2e-4)
_TIE = 0.01  # of the logits' range: a lead that rounding can turn


def rule_of(path: Path) -> Rule:
    """The rule for an ONNX file, by the operators that it has."""
    model = onnx.load(path, load_external_data=False)
    nodes = [*_nodes(model.graph), *(n for f in model.functions for n in f.node)]
    kinds = {node.op_type for node in nodes}
    if kinds & _ROUNDS_BY_CALL:
        return DYNAMIC
    if kinds & _ROUNDS_ACTIVATIONS or _quantizes_values(nodes):
        return ROUNDED
    if computes_in(onnx.TensorProto.BFLOAT16, model):
        return WIDENED
    if computes_in(onnx.TensorProto.FLOAT16, model):
        return HALF
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and attribute.i == INT8_ACTIVATIONS:
                return BLOCKS
    return EXACT


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                nodes += _nodes(attribute.g)
    return nodes


def _quantizes_values(nodes: list[onnx.NodeProto]) -> bool:
    """Whether a QuantizeLinear rounds something that is computed."""
    return any(node.op_type == "QuantizeLinear" for node in nodes)


@dataclass(frozen=True)
class Agreement:
    """What came out: differences relative to the range, the least cosine, equal top tokens.

    Of several outputs, each measured by itself, the worst.
    """

    rule: Rule
    difference: float
    single: float | None  # where there are sequences of one token
    cosine: float
    top1: float  # fraction of the rows that have a clear likeliest token

    @property
    def holds(self) -> bool:
        """Whether the rule is kept; NaN keeps none."""
        rule = self.rule
        if rule.most is not None and self.difference <= rule.most:
            return True
        if rule.cosine is None:
            return False
        if rule.single is not None and not (self.single is not None and self.single <= rule.single):
            return False
        return self.cosine >= rule.cosine and self.top1 == 1.0

    def __str__(self) -> str:
        single = "" if self.single is None else f"{self.single:.2g} for single tokens, "
        return (
            f"{self.difference:.2g} of the range, {single}cosine {self.cosine:.5f}, "
            f"same top token {self.top1:.0%} ({self.rule.name})"
        )


Rows = Sequence[np.ndarray]


def compare(rule: Rule, ours: Rows, theirs: Rows, outputs: Sequence[Output] = ()) -> Agreement:
    """Rows (n, features) of each sequence, ours and onnxruntime's.

    ``outputs``: those that stand side by side in them, where there are several.
    """
    shapes = [x.shape for x in ours], [x.shape for x in theirs]
    if shapes[0] != shapes[1]:
        raise ValueError(f"rows of shapes {shapes[0]}, onnxruntime's {shapes[1]}")
    found = [
        _of_output(rule, a, b)
        for a, b in zip(_apart(ours, outputs), _apart(theirs, outputs), strict=True)
    ]
    singles = [one.single for one in found if one.single is not None]
    return Agreement(
        rule,
        difference=_largest([one.difference for one in found]),
        single=_largest(singles) if singles else None,
        cosine=float(np.min([one.cosine for one in found])),
        top1=min(one.top1 for one in found),
    )


def largest_difference(ours: Rows, theirs: Rows, outputs: Sequence[Output] = ()) -> float:
    """Of the outputs that stand side by side in rows, each relative to the range of its own."""
    pairs = zip(_apart(ours, outputs), _apart(theirs, outputs), strict=True)
    both = [(_numbers(a), _numbers(b)) for a, b in pairs]
    return _largest([float(np.abs(a - b).max() / np.ptp(b)) for a, b in both])


def _numbers(rows: Rows) -> np.ndarray:
    return np.concatenate([np.ravel(matrix) for matrix in rows]).astype(np.float64)


def _largest(numbers: Sequence[float]) -> float:
    return float(np.max(numbers))  # NaN where there is one


def _apart(rows: Rows, outputs: Sequence[Output]) -> list[Rows]:
    """Each output's rows of every sequence: of what is pooled one, and of a number for each token,
    which are scores of places, one over the places."""
    if not outputs:
        return [rows]
    parts: list[Rows] = []
    begin = 0
    for output in outputs:
        own = [matrix[:, begin : begin + output.features] for matrix in rows]
        begin += output.features
        if output.pooled:
            own = [matrix[:1] for matrix in own]
        elif output.features == 1:
            own = [matrix.T for matrix in own]
        parts.append(own)
    return parts


def _of_output(rule: Rule, ours: Rows, theirs: Rows) -> Agreement:
    span = float(np.ptp(_numbers(theirs)))
    differences = [np.abs(x - y).max() / span for x, y in zip(ours, theirs, strict=True)]
    singles = [d for d, x in zip(differences, ours, strict=True) if len(x) == 1]
    pairs = [
        (x.astype(np.float64), y.astype(np.float64)) for x, y in zip(ours, theirs, strict=True)
    ]
    pairs = [(a, b) for a, b in pairs if a.shape[1] > 1]
    if not pairs:  # a number for each sequence: all of them are one row
        pairs = [(_numbers(ours)[None], _numbers(theirs)[None])]
    same = np.concatenate([_same_top(a, b, span) for a, b in pairs])
    return Agreement(
        rule,
        difference=_largest(differences),
        single=float(np.median(singles)) if singles else None,
        cosine=float(np.min([_cosines(a, b).min() for a, b in pairs])),
        top1=float(same.mean()),
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(axis=1) / norms
    return cosines


def _same_top(a: np.ndarray, b: np.ndarray, span: float) -> np.ndarray:
    """Of each row, whether the same number is the largest, or onnxruntime has none that leads."""
    second, first = np.sort(b, axis=1)[:, -2:].T
    same: np.ndarray = (a.argmax(axis=1) == b.argmax(axis=1)) | (first - second < _TIE * span)
    return same
