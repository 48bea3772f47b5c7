"""What a model is called and what its layers weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from slmtvm.importer.emit.sparsity import sparsity_of
from slmtvm.importer.recognise.steps import (
    Attention,
    Convolution,
    Elementwise,
    Embedding,
    Experts,
    Linear,
    Norm,
    PositionRows,
    QuantizeDequantize,
    Rope,
    Rows,
    Step,
    Weights,
    resolve,
)
from slmtvm.ir.model import LayerReport
from slmtvm.schedules.experts.points import HIDDEN, INPUT

_ACTIVATIONS = ("nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.relu", "sigmoid", "tanh")  # with kernels


def family_of(steps: Sequence[Step]) -> str:
    """The best-known architecture with these parts; "transformer" where none fits."""
    attentions = [s for s in steps if isinstance(s, Attention)]
    norms = [s for s in steps if isinstance(s, Norm)]
    ops = {s.op for s in steps if isinstance(s, Elementwise)}
    learned = any(isinstance(s, PositionRows) for s in steps)
    layer_norm = any(n.beta is not None for n in norms)
    if any(isinstance(s, Convolution) for s in steps):
        return "lfm2"
    if any(isinstance(s, Experts) for s in steps):
        return "qwen2-moe" if "sigmoid" in ops else "mixtral"
    if {a.mask for a in attentions} == {"bidirectional"}:
        biased = any(a.bias is not None for a in attentions)
        return "encoder" if not (learned and layer_norm) else "mpnet" if biased else "bert"
    if not any(isinstance(s, Rope) for s in steps):
        if any(a.bias is not None for a in attentions):
            return "bloom"
        return "gpt2" if learned and layer_norm else "transformer"
    if layer_norm:
        return "gpt-neox"
    normed_heads = any(n.groups > 1 for n in norms)
    if "nn.gelu_tanh" in ops:
        return "gemma3" if normed_heads else "gemma2"
    if "nn.silu" not in ops:
        return "transformer"
    if normed_heads:
        return "qwen3"
    if any(isinstance(s, Linear) and s.bias is not None for s in steps):
        return "qwen2"
    return "mistral" if any(a.window for a in attentions) else "llama"


def hidden_size(steps: Sequence[Step]) -> int:
    """The width of the residual stream: what the last norm norms, or where it starts."""
    widths = [s.gamma.array.size * s.groups for s in steps if isinstance(s, Norm)]
    return widths[-1] if widths else next(s.dim for s in steps if isinstance(s, Embedding))


def elementwise_notes(steps: Sequence[Step]) -> Iterator[str]:
    """The ops on single elements that are no residual, gate or activation, and what they cost."""
    counts = Counter(s.op for s in steps if isinstance(s, Elementwise) and not _is_usual(s))
    if counts:
        listing = ", ".join(f"{n} {op}" for op, n in sorted(counts.items()))
        yield (
            f"elementwise ops outside known patterns: {listing}; each is a pass over its rows, on "
            "one thread"
        )


def _is_usual(step: Elementwise) -> bool:
    rows = all(isinstance(o, Rows) for o in step.operands)
    return rows and (step.op in ("add", "multiply") or step.op in _ACTIVATIONS)


def layer_reports(by_name: Mapping[str, Step], order: Sequence[str]) -> Iterator[LayerReport]:
    """One entry for each step that holds weights, in ``order``."""
    for step in (by_name[name] for name in order):
        if isinstance(step, Embedding):
            table = step.table
            yield _report(table, "embedding", (step.vocab, step.dim), _bytes(table))
        elif isinstance(step, Linear):
            extra = 0 if step.bias is None else step.bias.array.nbytes
            sparsity = sparsity_of(step.weights, step.k)
            yield replace(
                _report(step.weights, "linear", (step.n, step.k), _bytes(step.weights) + extra),
                activation="static" if _is_rounded(by_name, step.x) else step.activation,
                sparsity=sparsity.pattern,
                zeros=sparsity.zeros,
                blocks_used=sparsity.used,
                windows=sparsity.windows,
            )
        elif isinstance(step, Experts):
            before = INPUT in step.roundings or _is_rounded(by_name, step.x)
            between = HIDDEN in step.roundings
            for layer, rounded in ((step.up, before), (step.down, between)):
                extra = 0 if layer.bias is None else layer.bias.array.nbytes
                shape = (step.routing.experts, layer.n, layer.k)
                size = _bytes(layer.weights) + extra
                yield replace(
                    _report(layer.weights, "experts", shape, size),
                    activation="static" if rounded else layer.activation,
                )
        elif isinstance(step, Convolution):
            array = step.weight.array
            yield LayerReport(
                step.weight.name, "convolution", array.T.shape, "f32", 0, array.nbytes
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


def _is_rounded(by_name: Mapping[str, Step], rows: Rows) -> bool:
    """Whether the file rounds ``rows`` with a constant scale."""
    return isinstance(by_name[resolve(by_name, rows)], QuantizeDequantize)


def _report(weights: Weights, kind: str, shape: tuple[int, ...], size: int) -> LayerReport:
    return LayerReport(
        weights.weight.name, kind, shape, weights.format, weights.group_size, size,
        group_channels=weights.group_channels,
    )  # fmt: skip


def _bytes(weights: Weights) -> int:
    parts = (weights.weight, weights.scales, weights.zero_points)
    return sum(p.value.nbytes for p in parts if p is not None)
