"""Heads and hidden features that are zero are cut out, of every layer that makes or reads them.

Structured pruning leaves them: inputs of a layer that no output weighs, or whose value is 0
whatever the tokens are. What is between the layers that make features and those that read them
computes each feature for itself: activations, gates, products with constants; an attention makes
features too, those of a head together. Where every reader can do without a feature, its makers can:
weights, buffers and the cache get smaller, and only the order of a sum of floats may change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slmtvm.importer.emit.feature_regions import Region, Regions, by_feature
from slmtvm.importer.emit.sparsity import nonzero
from slmtvm.importer.emit.split import taken_outputs
from slmtvm.importer.graph import Array
from slmtvm.importer.recognise.steps import (
    Attention,
    Elementwise,
    Linear,
    Norm,
    Param,
    QuantizeDequantize,
    Rope,
    Rows,
    Step,
    resolve,
)
from slmtvm.schedules.linear.packed_rows import pack_rows, unpack_rows

_OF_ZERO = (
    "nn.relu", "nn.silu", "nn.gelu", "nn.gelu_tanh", "tanh", "negative", "abs", "erf", "sin",
    "sqrt",
)  # fmt: skip
"""Functions that are 0 at 0."""
_LOOKED_AT = 16  # of a row's weights: where they differ, some are not zero


@dataclass(frozen=True)
class Cut:
    """What was cut out: of so many heads or features before ``reader``, the first of the layers
    that read them."""

    kind: str  # "heads" or "channels"
    reader: str
    cut: int
    whole: int


def cut_zeros(
    steps: Mapping[str, Step], outputs: Sequence[str]
) -> tuple[dict[str, Step], list[Cut]]:
    """``steps`` without the heads and features that change no output but by rounding."""
    cutter = _Cutter(steps, outputs)
    cutter.run()
    return cutter.steps, cutter.cuts


def cut_notes(cuts: Sequence[Cut]) -> list[str]:
    """What was cut out, a line for each kind."""
    notes = []
    for kind, what in (("heads", "attention"), ("channels", "layers inside of blocks")):
        of_kind = [cut for cut in cuts if cut.kind == kind]
        if of_kind:
            gone, whole = sum(c.cut for c in of_kind), sum(c.whole for c in of_kind)
            places = len(of_kind)
            notes.append(
                f"{gone} of {whole} {kind} of {what} are zero and cut out, in {places} "
                f"{'places' if places > 1 else 'place'}"
            )
    return notes


class _Cutter:
    def __init__(self, steps: Mapping[str, Step], outputs: Sequence[str]) -> None:
        self.steps = dict(steps)
        self.cuts: list[Cut] = []
        self._regions = Regions(self.steps, outputs)
        self._order = self._regions.order
        self._made: dict[tuple[int, bytes, str], Param] = {}

    def run(self) -> None:
        for region in self._regions.found():
            self._cut(region)

    def _cut(self, region: Region) -> None:
        attentions = [n for n in region.makers if isinstance(self.steps[n], Attention)]
        if len(attentions) > 1:
            return
        dead = self._dead(region)
        if not dead.any():
            return
        kept: Array | None
        if attentions:
            kept = self._without_heads(attentions[0], dead)
        else:
            size = max(_group(self.steps[n]) for n in region.readers)
            kept = _whole_groups(~dead, size)
        if kept is None or kept.all():
            return
        if any(region.width % (_group(self.steps[n]) or 1) for n in region.readers) or any(
            not _keeps_groups(kept, _group(self.steps[n])) for n in region.readers
        ):
            return
        features = np.flatnonzero(kept)
        changed: dict[str, Step] = {}
        for name in region.makers:
            step = self.steps[name]
            if isinstance(step, Linear):
                part = self._outputs(step, features)
                if part is None:
                    return
                changed[name] = part
        if attentions:
            of_head = self._attention(attentions[0], kept)
            if of_head is None:
                return
            changed.update(of_head)
        for name in region.between:
            changed[name] = self._between(self.steps[name], features, region.width)
        for name in region.readers:
            step = changed.get(name, self.steps[name])
            assert isinstance(step, Linear)
            changed[name] = self._inputs(step, features)
        self.steps.update(changed)
        first = self.steps[region.readers[0]]
        assert isinstance(first, Linear)
        unit = 1
        if attentions:
            step = self.steps[attentions[0]]
            assert isinstance(step, Attention)
            unit = step.head_dim
        gone = int((~kept).sum()) // unit
        kind = "heads" if attentions else "channels"
        self.cuts.append(Cut(kind, first.weights.weight.name, gone, region.width // unit))

    def _dead(self, region: Region) -> Array:
        """Which features no reader needs."""
        zero = self._zeros(region)
        dead = np.ones(region.width, bool)
        for name in region.readers:
            step = self.steps[name]
            assert isinstance(step, Linear)
            is_zero = zero[resolve(self.steps, step.x)]
            if step.activation == "row_u8":  # the largest of a row sets the scale of all
                dead &= is_zero
            elif not is_zero.all():
                dead &= is_zero | _zero_inputs(step)
            if not dead.any():
                break
        return dead

    def _zeros(self, region: Region) -> dict[str, Array]:
        """Which features of each value are 0 for all tokens."""
        zero: dict[str, Array] = {}
        for name in self._order:
            step = self.steps[name]
            if name in region.makers and isinstance(step, Linear):
                zero[name] = _zero_outputs(step)
            elif name in region.makers and isinstance(step, Attention):
                values = self.steps[resolve(self.steps, step.v)]
                heads = np.zeros(step.num_kv_heads, bool)
                if isinstance(values, Linear):
                    by_head = _zero_outputs(values).reshape(step.num_kv_heads, -1)
                    heads = np.asarray(by_head.all(axis=1))
                group = step.num_heads // step.num_kv_heads
                zero[name] = np.repeat(heads, group * step.head_dim)
            elif name in region.between and isinstance(step, Elementwise):
                zero[name] = _zero_of(step, lambda rows: zero[resolve(self.steps, rows)])
                zero[name] = np.broadcast_to(zero[name], (region.width,))
            elif name in region.between and isinstance(step, QuantizeDequantize):
                zero[name] = zero[resolve(self.steps, step.x)]
        return zero

    def _without_heads(self, name: str, dead: Array) -> Array | None:
        """Which features stay of an attention's: whole heads, as many of each group."""
        step = self.steps[name]
        assert isinstance(step, Attention)
        groups = step.num_kv_heads
        heads = dead.reshape(groups, -1, step.head_dim).all(axis=2)
        stays = np.asarray(~heads)
        if not stays.any():
            stays[0, 0] = True
        used = stays.any(axis=1)
        most = int(stays.sum(axis=1).max())
        for group in np.flatnonzero(used):
            missing = most - int(stays[group].sum())
            stays[group, np.flatnonzero(~stays[group])[:missing]] = True
        return np.repeat(stays.reshape(-1), step.head_dim)

    def _attention(self, name: str, kept: Array) -> dict[str, Step] | None:
        """The attention and what makes its queries, keys and values, with the heads that stay."""
        step = self.steps[name]
        assert isinstance(step, Attention)
        heads: Array = kept.reshape(step.num_heads, -1)[:, 0]
        pairs = np.asarray(heads.reshape(step.num_kv_heads, -1).any(axis=1))
        found: dict[str, Step] = {}
        for rows, stays in ((step.q, heads), (step.k, pairs), (step.v, pairs)):
            if stays.all():
                continue
            made = self._projection(resolve(self.steps, rows), stays, step.head_dim, name)
            if made is None:
                return None
            found.update(made)
        bias = step.bias
        if bias is not None:
            bias = Param(f"{bias.name}[heads]", np.ascontiguousarray(bias.array[heads]))
        sinks = step.sinks
        if sinks is not None:
            sinks = Param(f"{sinks.name}[heads]", np.ascontiguousarray(sinks.array[heads]))
        visible = step.visible
        if visible is not None and len(visible.array) > 1:
            visible = Param(f"{visible.name}[heads]", np.ascontiguousarray(visible.array[heads]))
        found[name] = replace(
            step, num_heads=int(heads.sum()), num_kv_heads=int(pairs.sum()), bias=bias,
            sinks=sinks, visible=visible,
        )  # fmt: skip
        return found

    def _projection(
        self, rows: str, heads: Array, head_dim: int, reader: str
    ) -> dict[str, Step] | None:
        """The steps up to the linear layer that makes ``rows``, of the ``heads`` that stay; None
        where something else reads them, or makes them in another way."""
        features = np.flatnonzero(np.repeat(heads, head_dim))
        width, number = len(heads) * head_dim, int(heads.sum())
        found: dict[str, Step] = {}
        while True:
            step = self.steps[rows]
            if not self._regions.is_private(rows, reader):
                return None
            if isinstance(step, Linear):
                part = self._outputs(step, features) if step.n == width else None
                return None if part is None else {**found, rows: part}
            if isinstance(step, Rope) and step.num_heads == len(heads):
                found[rows] = replace(step, num_heads=number)
            elif isinstance(step, Norm) and step.groups == len(heads):
                found[rows] = replace(step, groups=number)
            elif isinstance(step, (Elementwise, QuantizeDequantize)) and by_feature(step, width):
                found[rows] = self._between(step, features, width)
            else:
                return None
            if len(step.inputs) != 1:
                return None
            reader, rows = rows, resolve(self.steps, step.inputs[0])

    def _outputs(self, step: Linear, features: Array) -> Linear | None:
        """``step`` with these outputs; None where blocks of outputs that share scales are cut."""
        part = taken_outputs(step, features, f"{len(features)} outputs")
        if part is None:
            return None
        weights = part.weights
        shared: dict[str, Any] = {
            name: self._shared(getattr(step.weights, name), features, "outputs", param)
            for name in ("weight", "scales", "zero_points")
            if (param := getattr(weights, name)) is not None
        }
        return replace(part, weights=replace(weights, **shared))

    def _inputs(self, step: Linear, features: Array) -> Linear:
        """``step`` with these inputs; groups of inputs stay or go as a whole."""
        old, k = step.weights, step.k
        values = unpack_rows(old.weight.array, k, old.bits)[:, features]
        weight = pack_rows(np.ascontiguousarray(values), old.bits)

        def by_input(param: Param | None) -> Param | None:
            if param is None or not (old.group_size or old.group_channels):
                return param
            chosen = features if old.group_channels else features[:: old.group_size]
            places = chosen if old.group_channels else chosen // old.group_size
            by_row = param.array.reshape(len(param.array), -1)
            return self._shared(
                param, features, "inputs", Param(_cut_name(param, features, "inputs"),
                                                 np.ascontiguousarray(by_row[:, places])),
            )  # fmt: skip

        made = Param(_cut_name(old.weight, features, "inputs"), weight)
        weights = replace(
            old,
            weight=self._shared(old.weight, features, "inputs", made),
            scales=by_input(old.scales),
            zero_points=by_input(old.zero_points),
        )
        return replace(step, weights=weights, k=len(features))

    def _between(self, step: Step, features: Array, width: int) -> Step:
        if not isinstance(step, Elementwise):
            return step
        operands = tuple(
            Param(_cut_name(o, features, "features"), o.array[..., features])
            if isinstance(o, Param) and o.value.shape[-1:] == (width,)
            else o
            for o in step.operands
        )
        return replace(step, operands=operands)

    def _shared(self, old: Param, features: Array, how: str, made: Param) -> Param:
        """``made`` of ``old``, or what was made of it before: layers may share a weight."""
        return self._made.setdefault((id(old.value), features.tobytes(), how), made)


def _cut_name(param: Param, features: Array, how: str) -> str:
    return f"{param.name}[{len(features)} {how}]"


def _group(step: Step) -> int:
    """Inputs that share scales, and stay or go together."""
    return step.weights.group_size if isinstance(step, Linear) else 0


def _whole_groups(kept: Array, size: int) -> Array:
    """``kept`` grown to whole groups; at least one stays."""
    size = size or 1
    if len(kept) % size:
        return np.ones_like(kept)
    groups = np.asarray(kept.reshape(-1, size).any(axis=1))
    groups[0] |= not groups.any()
    return np.repeat(groups, size)


def _keeps_groups(kept: Array, size: int) -> bool:
    return not size or bool((np.diff(kept.reshape(-1, size).astype(np.int8), axis=1) == 0).all())


def _zero_of(step: Elementwise, of_rows: Callable[[Rows], Array]) -> Array:
    """Which features of a step's result are 0, where finite numbers are computed with."""
    zero = [
        of_rows(o)
        if isinstance(o, Rows)
        else np.atleast_1d((o.array == 0).reshape(-1))
        if isinstance(o, Param)
        else np.array([o == 0])
        for o in step.operands
    ]
    if step.op == "multiply":
        return zero[0] | zero[1]
    if step.op in ("add", "subtract", "maximum", "minimum"):
        return zero[0] & zero[1]
    if step.op == "divide" and not isinstance(step.operands[1], Rows):
        return zero[0] & ~zero[1]
    if step.op == "power" and isinstance(step.operands[1], float) and step.operands[1] > 0:
        return zero[0]
    if step.op in _OF_ZERO:
        return zero[0]
    return np.zeros(1, bool)


def _zero_outputs(step: Linear) -> Array:
    """Which outputs of a layer are 0: their weights and bias."""
    stored = step.weights.weight.array
    zero = np.asarray((stored[:, :_LOOKED_AT] == stored[:, :1]).all(axis=1))
    if step.bias is not None:
        zero &= step.bias.array == 0
    rows = np.flatnonzero(zero)
    if rows.size:
        zero[rows] = ~nonzero(step.weights, rows, step.k).any(axis=1)
    return zero


def _zero_inputs(step: Linear) -> Array:
    """Which inputs a layer weighs with 0 alone."""
    zero = np.ones(step.k, bool)
    for begin in range(0, step.n, 256):
        rows = np.arange(begin, min(begin + 256, step.n))
        zero &= ~nonzero(step.weights, rows, step.k).any(axis=0)
        if not zero.any():
            break
    return zero
