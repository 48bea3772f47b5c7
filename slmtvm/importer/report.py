"""What a model is called and what its layers weigh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from slmtvm.importer.emit import resolve
from slmtvm.importer.steps import (
    Attention,
    Elementwise,
    Embedding,
    Linear,
    Norm,
    PositionRows,
    QuantizeDequantize,
    Rope,
    Step,
    Weights,
)
from slmtvm.ir.model import LayerReport


def family_of(steps: Sequence[Step]) -> str:
    """The best-known architecture with these parts; "transformer" where none fits."""
    masks = {s.mask for s in steps if isinstance(s, Attention)}
    rotary = any(isinstance(s, Rope) for s in steps)
    learned = any(isinstance(s, PositionRows) for s in steps)
    layer_norm = any(isinstance(s, Norm) and s.beta is not None for s in steps)
    gated = any(isinstance(s, Elementwise) and s.op == "nn.silu" for s in steps)
    biased = any(isinstance(s, Linear) and s.bias is not None for s in steps)
    if masks == {"bidirectional"}:
        return "bert" if learned and layer_norm else "encoder"
    if rotary and gated and not layer_norm:
        return "qwen2" if biased else "llama"
    if rotary and layer_norm:
        return "gpt-neox"
    if learned and layer_norm:
        return "gpt2"
    return "transformer"


def layer_reports(by_name: Mapping[str, Step], order: Sequence[str]) -> Iterator[LayerReport]:
    """One entry for each step that holds weights, in ``order``."""
    for step in (by_name[name] for name in order):
        if isinstance(step, Embedding):
            table = step.table
            yield _report(table, "embedding", (step.vocab, step.dim), _bytes(table))
        elif isinstance(step, Linear):
            extra = 0 if step.bias is None else step.bias.array.nbytes
            rounded = isinstance(by_name[resolve(by_name, step.x)], QuantizeDequantize)
            yield replace(
                _report(step.weights, "linear", (step.n, step.k), _bytes(step.weights) + extra),
                activation="static" if rounded else step.activation,
            )
        elif isinstance(step, Norm):
            arrays = [p.array for p in (step.gamma, step.beta) if p is not None]
            size = sum(a.nbytes for a in arrays)
            yield LayerReport(step.gamma.name, "norm", step.gamma.array.shape, "f32", 0, size)
        elif isinstance(step, PositionRows):
            array = step.table.array
            yield LayerReport(
                step.table.name, "position table", array.shape, "f32", 0, array.nbytes
            )


def _report(weights: Weights, kind: str, shape: tuple[int, ...], size: int) -> LayerReport:
    return LayerReport(weights.weight.name, kind, shape, weights.format, weights.group_size, size)


def _bytes(weights: Weights) -> int:
    parts = (weights.weight, weights.scales, weights.zero_points)
    return sum(p.array.nbytes for p in parts if p is not None)
