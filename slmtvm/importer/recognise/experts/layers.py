"""The layers of experts that a graph computes one by one, or with matrices gathered by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Node, transposed
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.evidence.pieces import Account, in_arrays, probing_numbers
from slmtvm.importer.recognise.evidence.ranges import FINITE
from slmtvm.importer.recognise.evidence.regions import Override, evaluate_all
from slmtvm.importer.recognise.experts.weights import (
    Mixture,
    apply_layer,
    rounded_weights,
    side_by_side,
    stacked,
    stacked_weights,
    swapped_halves,
    with_stand_in,
)
from slmtvm.importer.recognise.linear.integers import Int8Product
from slmtvm.importer.recognise.linear.nbits import block_layer
from slmtvm.importer.recognise.linear.weights import kernel_groups, linear_weights
from slmtvm.importer.recognise.rounding.rounding import rounding_of, rounding_override
from slmtvm.importer.recognise.steps import ExpertWeights, Param, Weights
from slmtvm.ir.experts import Gate
from slmtvm.ir.reference.experts import apply_gate

_TOLERANCE = 1e-6
_GATES = (
    Gate("swiglu"), Gate("silu"), Gate("relu"), Gate("gelu_erf"), Gate("gelu_tanh"),
    Gate("identity"),
)  # fmt: skip


def find_experts(
    cover: Cover,
    nodes: Sequence[Node],
    x: str,
    integers: Mapping[str, Int8Product],
    overrides: dict[str, Override],
) -> Mixture | None:
    """The experts whose products are among ``nodes``; None where they do not look like experts.

    ``integers``: those products that the file computes on integers, by their results.
    ``overrides`` is given what computes products on probes without expanding them each time.
    """
    products = [n for n in nodes if operator_of(n).kind is Kind.CONTRACT]
    makers = {o: n for n in nodes for o in n.outputs}
    before = {n.outputs[0]: _products_before(cover, n, makers, x) for n in products}
    downs = [n for n in products if before[n.outputs[0]]]
    ups = {n.outputs[0] for n in products} - {n.outputs[0] for n in downs}
    mixtures: list[Mixture] = []
    for down in downs:
        sources = [n for n in products if n.outputs[0] in before[down.outputs[0]]]
        if not 1 <= len(sources) <= 2 or any(n.outputs[0] not in ups for n in sources):
            return None
        layers = [_product_layer(cover, n, integers, overrides) for n in (*sources, down)]
        if any(layer is None for layer in layers):
            return None
        *first, last = (layer for layer in layers if layer is not None)
        gated = _gate(cover, nodes, sources, down, first)
        if gated is None:
            return None
        gate, up = gated
        mixtures.append(Mixture(up, gate, last))
    alike = {(m.gate, m.up.n, m.up.k, m.down.n) for m in mixtures}
    if len(alike) != 1:
        return None  # or one of them is a shared expert
    if len(mixtures) == 1:
        return mixtures[0]
    return Mixture(
        stacked([m.up for m in mixtures]), mixtures[0].gate, stacked([m.down for m in mixtures])
    )


def _products_before(cover: Cover, node: Node, makers: dict[str, Node], x: str) -> set[str]:
    """The products that the rows which ``node`` multiplies come from, not looking behind them."""
    found: set[str] = set()
    todo = [name for name in node.inputs if name in makers]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        maker = makers.get(name)
        if maker is None or name in seen or name == x or maker.op_type == "TopK":
            continue
        seen.add(name)
        if operator_of(maker).kind is Kind.CONTRACT:
            found.add(maker.outputs[0])
        else:
            todo.extend(maker.inputs)
    return found


def _product_layer(
    cover: Cover, node: Node, integers: Mapping[str, Int8Product], overrides: dict[str, Override]
) -> ExpertWeights | None:
    """The weights of one product: of one expert, or of all where they are gathered."""
    found = integers.get(node.outputs[0])
    if found is not None:
        layer = _stack_of_one(found.weights, None, found.n, found.k, "row_u8")
        overrides[node.outputs[0]] = _product_of(layer)
        return layer
    if node.op_type == "MatMulNBits":
        return _block_layer(cover, node, overrides)
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    gathered = _gathered_layer(cover, node, overrides)
    return gathered or _own_layer(cover, node, overrides)


def _own_layer(cover: Cover, node: Node, overrides: dict[str, Override]) -> ExpertWeights | None:
    """``x @ constant``: one expert, as a stack of one."""
    constant = cover.frame.small.constants.get(node.inputs[1])
    if constant is None or node.inputs[0] in cover.frame.small.constants:
        return None
    bias = None
    if node.op_type == "Gemm":
        if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0:
            return None
        if node.attrs.get("transB", 0):
            constant = transposed(constant)
    if len(constant.shape) != 2:
        return None
    k, n = constant.shape
    where = cover.frame.graph.where(node)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2]:
        bias = cover.vector(node.inputs[2], n, node.attrs.get("beta", 1.0), where)
    # A gate may put the halves of the outputs in another order.
    weights = linear_weights(constant, where, cover.note, dividing=n if n % 2 else n // 2)
    layer = _stack_of_one(weights, bias, n, k, "f32")
    overrides[node.outputs[0]] = _product_of(layer)
    return layer


def _block_layer(cover: Cover, node: Node, overrides: dict[str, Override]) -> ExpertWeights | None:
    """A MatMulNBits node on the rows of one expert."""
    found = block_layer(cover, node)
    if found.group_index is not None:
        return None  # each expert would read its own order of features
    weights = kernel_groups(found.weights, found.k, cover.note)
    layer = _stack_of_one(weights, found.bias, found.n, found.k, found.activation)
    overrides[node.outputs[0]] = _product_of(layer)
    return layer


def _stack_of_one(
    weights: Weights, bias: Param | None, n: int, k: int, activation: str
) -> ExpertWeights:
    """The layer of one expert; scales for all of its outputs become one for each."""

    def lead(param: Param | None) -> Param | None:
        if param is None:
            return None
        array = param.array
        if array.shape == (1,) and n != 1 and param is not weights.weight:
            array = np.broadcast_to(array, (n,))
        return Param(param.name, array[None])

    weight = lead(weights.weight)
    assert weight is not None
    whole = Weights(
        weights.format, weight, lead(weights.scales), lead(weights.zero_points),
        weights.group_size, weights.group_channels,
    )  # fmt: skip
    return with_stand_in(ExpertWeights(whole, lead(bias), n, k, activation))


def _product_of(layer: ExpertWeights) -> Override:
    """Computes the product of the only expert of ``layer`` on probes."""

    def multiply(inputs: Sequence[Array | None]) -> Array:
        assert inputs[0] is not None
        return apply_layer(layer, 0, inputs[0])

    return multiply


def _gathered_layer(
    cover: Cover, node: Node, overrides: dict[str, Override]
) -> ExpertWeights | None:
    """A product with matrices that tokens picked from a constant (experts, ...).

    Where what they picked is rounded, so are the weights: ``overrides`` is given the rounding.
    """
    frame = cover.frame
    for side in range(2):
        name, turned = node.inputs[side], side == 1
        quantizer: Node | None = None
        restored: Node | None = None
        while (maker := frame.producers.get(name)) is not None:
            if frame.small.is_lookup(maker):
                table = frame.small.constants[maker.inputs[0]]
                if len(table.shape) != 3 or maker.attrs.get("axis", 0) != 0:
                    return None
                where = frame.graph.where(node)
                if quantizer is None or restored is None:
                    floats = quantizer is restored
                    return stacked_weights(table, where, turned=turned) if floats else None
                rounding = rounding_of(cover, quantizer)
                if rounding != rounding_of(cover, restored):
                    return None
                overrides[quantizer.outputs[0]] = _in_float32(rounding_override(rounding))
                return rounded_weights(table, rounding, where, turned=turned)
            if maker.op_type == "Transpose":
                if tuple(maker.attrs.get("perm", ())) != (0, 2, 1):
                    return None
                turned = not turned
            elif maker.op_type == "DequantizeLinear" and restored is None:
                restored = maker
            elif maker.op_type == "QuantizeLinear" and quantizer is None:
                quantizer = maker
            elif maker.op_type not in ("Cast", "Identity"):
                break
            name = maker.inputs[0]
    return None


def _in_float32(compute: Override) -> Override:
    """``compute`` as the file has it, for weights: in float64 a level may be another one."""

    def narrow(inputs: Sequence[Array | None]) -> Array:
        given = [None if i is None else i.astype(np.float32) for i in inputs]
        return compute(given).astype(np.float64)

    return narrow


def _gate(
    cover: Cover,
    nodes: Sequence[Node],
    sources: Sequence[Node],
    down: Node,
    layers: Sequence[ExpertWeights],
) -> tuple[Gate, ExpertWeights] | None:
    """What lies between the products ``sources`` and ``down``, and the first layer put so that it
    is one of the known gates."""
    makers = {o: n for n in nodes for o in n.outputs}
    starts = [n.outputs[0] for n in sources]
    hidden = next((i for i in down.inputs if _reaches(i, starts, makers)), None)
    if hidden is None:
        return None
    between = _nodes_between(hidden, starts, makers)
    candidates = list(_possible_gates(layers))
    account = Account(cover.frame.small, between, dict.fromkeys(starts, FINITE))
    try:
        for rows, values in _gate_probes(cover, starts, layers, between):
            result = values[hidden].reshape(len(rows), -1)
            candidates = [c for c in candidates if _is_gate(c.gate, rows[:, c.features], result)]
            if not candidates:
                return None
            account.see(values)
    except (InvalidModelError, UnsupportedOpError, KeyError, ValueError):
        return None
    return (candidates[0].gate, candidates[0].up) if account.missing is None else None


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A gate, and the first layer whose ``features`` of all that come from the graph's it takes."""

    gate: Gate
    features: Array
    up: ExpertWeights


def _possible_gates(layers: Sequence[ExpertWeights]) -> Iterator[_Candidate]:
    first, n = layers[0], layers[0].n
    if len(layers) == 2:
        if layers[1].n == n:
            for order in ((0, 1), (1, 0)):
                features = np.concatenate([np.arange(n) + i * n for i in order])
                yield _Candidate(Gate("swiglu"), features, side_by_side([layers[i] for i in order]))
        return
    for gate in _GATES:
        if gate.activation != "swiglu" or n % 2 == 0:
            yield _Candidate(gate, np.arange(n), first)
    if n % 2 == 0:
        swapped = np.roll(np.arange(n), n // 2)
        yield _Candidate(Gate("swiglu"), swapped, swapped_halves(first))


def _gate_probes(
    cover: Cover, starts: Sequence[str], layers: Sequence[ExpertWeights], between: Sequence[Node]
) -> Iterator[tuple[Array, Mapping[str, Array]]]:
    """Rows (tokens, features) of all ``starts`` side by side, and what ``between`` makes of them.

    Half of the features are numbers that show what is done to them, first the one half, then the
    other; the rest are near 1, so that factors neither vanish nor hide each other.
    """
    frozen = cover.frame.small
    shapes = [_shape(cover, s, la) for s, la in zip(starts, layers, strict=True)]
    tokens, width = int(np.prod(shapes[0])) // layers[0].n, layers[0].n * len(starts)
    numbers = probing_numbers(frozen, between)
    for half in (slice(0, -(-width // 2)), slice(width // 2, width)):
        for samples in in_arrays(numbers, (tokens, half.stop - half.start)):
            rows = cover.random.normal(size=(tokens, width))
            rows[:, half] = samples
            parts = np.split(rows, len(starts), axis=1)
            given = {s: x.reshape(k) for s, x, k in zip(starts, parts, shapes, strict=True)}
            yield rows, evaluate_all(frozen, between, given)


def _is_gate(gate: Gate, x: Array, result: Array) -> bool:
    want = apply_gate(gate, x)
    if want.shape != result.shape:
        return False
    known = np.isfinite(result)  # far out the graph's own spelling may overflow
    return bool((np.abs(want - result) <= _TOLERANCE * (1 + np.abs(want)))[known].all())


def _shape(cover: Cover, name: str, layer: ExpertWeights) -> tuple[int, ...]:
    """The shape of a product's result; where it depends on who chose the expert, any will do."""
    return cover.frame.small.shapes.get(name, (3, layer.n))


def _reaches(name: str, starts: Sequence[str], makers: dict[str, Node]) -> bool:
    return any(start in _names_before(name, starts, makers) for start in starts)


def _names_before(name: str, starts: Sequence[str], makers: dict[str, Node]) -> set[str]:
    """All that ``name`` depends on, itself included, not looking behind ``starts``."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        if here not in starts and here in makers:
            todo.extend(makers[here].inputs)
    return seen


def _nodes_between(name: str, starts: Sequence[str], makers: dict[str, Node]) -> list[Node]:
    """The nodes that compute ``name`` from ``starts``, in order."""
    needed = _names_before(name, starts, makers) - set(starts)
    unique = {id(makers[n]): makers[n] for n in makers if n in needed}
    return list(unique.values())
