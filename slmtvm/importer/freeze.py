"""The graph for one sequence of fixed length: constants computed, all shapes known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Constant, Graph, Node, Quantization, transposed
from slmtvm.importer.halves import narrowed, widened
from slmtvm.importer.operators import Kind, Operator, find
from slmtvm.importer.operators.elementwise import cast_dtype
from slmtvm.importer.roles import Roles

Shape = tuple[int, ...]

# What numpy raises where operands do not fit each other.
_COMPUTE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_MIN_ELEMENTS = 1 << 22
_MATRICES = 80  # length x length matrices (masks of every head) that one constant may need


@dataclass
class Frozen:
    """``graph`` for batch 1 and ``length`` tokens.

    A value is in ``constants``, or it depends on the tokens: then ``shapes`` and ``dtypes`` have
    it, or ``broken`` says why its shape cannot be known.
    """

    graph: Graph
    length: int
    constants: dict[str, Constant] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)  # node -> longest length its table allows
    max_elements: int = 0  # of one constant

    def is_lookup(self, node: Node) -> bool:
        """Whether ``node`` picks rows of a constant table by a value that depends on tokens."""
        if operator_of(node).kind is Kind.LOOKUP:
            return True
        return (
            node.op_type in ("Gather", "GatherND")
            and node.inputs[0] in self.constants
            and node.inputs[1] not in self.constants
        )


def operator_of(node: Node) -> Operator:
    """The table's entry for ``node``; load has checked that there is one."""
    operator = find(node.domain, node.op_type, node.version)
    assert operator is not None
    return operator


def compute(graph: Graph, node: Node, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """``node`` on ``inputs``; raises InvalidModelError naming it where they do not fit."""
    attrs = node.attrs
    if node.op_type == "Split":
        attrs = {**attrs, "num_outputs": len(node.outputs)}
    try:
        with np.errstate(all="ignore"):
            result = operator_of(node).evaluate(attrs, *inputs)
    except _COMPUTE_ERRORS as error:
        shapes = [None if i is None else list(i.shape) for i in inputs]
        raise InvalidModelError(
            f"cannot be computed on shapes {shapes}: {error}", where=graph.where(node)
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    needed = max(i + 1 for i, name in enumerate(node.outputs) if name)
    if needed > len(results):
        raise UnsupportedOpError(
            f"output {node.outputs[needed - 1]!r} is not supported", where=graph.where(node)
        )
    return tuple(np.asarray(r) for r in results)


def freeze(graph: Graph, roles: Roles, length: int) -> Frozen:
    """Specialise ``graph`` to one sequence of ``length`` tokens at position 0, without a past.

    Constants that nothing dynamic reads are dropped. Raises InvalidModelError where shapes
    contradict each other or a constant grows out of all proportion, and UnsupportedOpError where a
    part of the graph that was left out is needed at this length.
    """
    frozen = start(graph, roles, length)
    waiting = Counter(name for node in graph.nodes for name in set(node.inputs))
    waiting.update(port.name for port in graph.outputs)
    waiting.update(decision.condition for decision in graph.decisions)
    for node in graph.nodes:
        if advance(frozen, node):
            for name in set(node.inputs) - {""}:
                waiting[name] -= 1
                if waiting[name] == 0:
                    frozen.constants.pop(name, None)
    _check_declared(frozen)
    _check_decisions(frozen)
    return frozen


def start(graph: Graph, roles: Roles, length: int) -> Frozen:
    """``graph`` before its first node: initializers and inputs."""
    weights = sum(math.prod(c.shape) for c in graph.initializers.values())
    limit = max(_MIN_ELEMENTS, _MATRICES * length * length, 2 * weights)
    frozen = Frozen(graph, length, max_elements=limit)
    frozen.constants.update(graph.initializers)
    frozen.constants.update({k: Constant.of(k, v) for k, v in roles.values(length).items()})
    frozen.shapes[roles.tokens.name] = (1, length)
    frozen.dtypes[roles.tokens.name] = np.dtype(np.int64)
    return frozen


def advance(frozen: Frozen, node: Node) -> bool:
    """Compute ``node`` or infer its shapes; whether its inputs are done with as constants."""
    reason = next((frozen.broken[i] for i in node.inputs if i in frozen.broken), None)
    if reason is None and operator_of(node).kind is Kind.BRANCH:
        reason = f"{node.label}: its condition is not known without the tokens"
    if operator_of(node).kind is Kind.SCATTER and node.inputs[0] not in frozen.broken:
        reason = None  # the result is as large as what is scattered into
    if reason is not None:
        frozen.broken.update(dict.fromkeys(filter(None, node.outputs), reason))
        return False
    if all(not i or i in frozen.constants for i in node.inputs):
        _fold(frozen, node, frozen.max_elements)
    elif operator_of(node).kind is Kind.SHAPE:
        shape = frozen.shapes[node.inputs[0]]
        (value,) = compute(frozen.graph, node, [_nothing(shape)])
        frozen.constants[node.outputs[0]] = Constant.of(node.outputs[0], value)
    else:
        _infer(frozen, node, frozen.max_elements)
        return False
    return True


def truth(frozen: Frozen, name: str) -> bool | None:
    """The one boolean that ``name`` holds, or None where it is not known."""
    constant = frozen.constants.get(name)
    if constant is None or constant.dtype != np.bool_ or constant.stored.size != 1:
        return None
    return bool(constant.stored.reshape(-1)[0])


def _check_decisions(frozen: Frozen) -> None:
    for decision in frozen.graph.decisions:
        if truth(frozen, decision.condition) != decision.outcome:
            raise UnsupportedOpError(
                f"its condition {decision.condition!r} changes with the sequence length or its "
                f"mask: it is not {decision.outcome} for {frozen.length} tokens; compile for a "
                "shorter context",
                where=decision.where,
            )


def _nothing(shape: Shape) -> Array:
    """An array of a shape that occupies one byte."""
    return np.broadcast_to(np.uint8(0), shape)


def _fold(frozen: Frozen, node: Node, limit: int) -> None:
    given = [frozen.constants[i] if i else None for i in node.inputs]
    try:
        lazy = None if _restores_lookup(frozen, node) else _keep_packed(node, given)
        if lazy is not None:
            frozen.constants[node.outputs[0]] = lazy
            return
        values = [None if c is None else c.values() for c in given]
    except UnsupportedOpError as error:
        raise UnsupportedOpError(str(error), where=frozen.graph.where(node)) from error
    except _COMPUTE_ERRORS as error:
        raise InvalidModelError(
            f"cannot be computed: {error}", where=frozen.graph.where(node)
        ) from error
    _check_size(frozen.graph, node, values, limit)
    if operator_of(node).kind is Kind.MOVE:
        results = compute(frozen.graph, node, values)
    else:
        wide = compute(frozen.graph, node, widened(values))
        results = tuple(narrowed(result, values) for result in wide)
    source = given[0] if given else None
    if source is not None and source.name in frozen.graph.initializers:
        _note_limit(frozen, node, source, values, results[0])
    for name, value in zip(node.outputs, results, strict=False):
        if not name:
            continue
        # A view of a weight is still that weight, and keeps its name.
        view = source is not None and np.may_share_memory(value, source.stored)
        title = source.name if view and source is not None else name
        frozen.constants[name] = Constant.of(title, value)


def _note_limit(
    frozen: Frozen, node: Node, table: Constant, values: Sequence[Array | None], result: Array
) -> None:
    """Remember how long a sequence may be before ``node`` reads past the end of its table."""
    length = frozen.length
    if node.op_type == "Gather" and length in result.shape:
        indices = values[1]
        if indices is not None and indices.size >= length:
            rows = table.shape[node.attrs.get("axis", 0)]
            frozen.limits[node.outputs[0]] = rows - (int(indices.max()) - (length - 1))
    elif node.op_type == "Slice" and len(result.shape) == len(table.shape):
        cut = [t for t, r in zip(table.shape, result.shape, strict=True) if r == length != t]
        if cut:
            frozen.limits[node.outputs[0]] = min(cut)


def _restores_lookup(frozen: Frozen, node: Node) -> bool:
    """Whether ``node`` dequantizes integers looked up in a smaller table, each of them many times:
    biases by distance, say. They are no weight whose bits are worth keeping."""
    if node.op_type != "DequantizeLinear":
        return False
    looked_up = frozen.constants[node.inputs[0]]
    made = (n for n in frozen.graph.nodes if looked_up.name in n.outputs and n.op_type == "Gather")
    table = next((frozen.graph.initializers.get(n.inputs[0]) for n in made), None)
    return table is not None and math.prod(looked_up.shape) > math.prod(table.shape)


def _keep_packed(node: Node, given: Sequence[Constant | None]) -> Constant | None:
    """The result of ``node`` without expanding a packed weight, or None where it must compute."""
    if not given or given[0] is None:
        return None
    first = given[0]
    if node.op_type == "DequantizeLinear" and first.quantization is None:
        scales, zeros = given[1], given[2] if len(given) > 2 else None
        if scales is None:
            return None
        quantization = Quantization(
            scales.values(table=True),
            None if zeros is None else zeros.values(table=True),
            node.attrs.get("axis", 1),
            node.attrs.get("block_size", 0),
        )
        quantization.check(first.shape)
        return replace(first, dtype=scales.dtype, quantization=quantization)
    if node.op_type == "Cast":
        dtype = cast_dtype(node.attrs)
        floats = first.dtype.kind not in "iub" and dtype.kind not in "iub"
        if floats and dtype.itemsize >= first.dtype.itemsize:
            return replace(first, dtype=dtype)
        return None
    if first.plain:
        return None
    if node.op_type == "Identity":
        return first
    if operator_of(node).kind is Kind.MOVE and first.quantization is None and first.packed is None:
        rest = [None if c is None else c.values() for c in given[1:]]
        moved = compute_quietly(node, [first.stored, *rest])
        return None if moved is None else replace(first, stored=moved)
    if node.op_type == "Transpose" and len(first.shape) == 2:
        return first if node.attrs.get("perm", (1, 0)) != (1, 0) else transposed(first)
    return None


def compute_quietly(node: Node, inputs: Sequence[Array | None]) -> Array | None:
    """The first output of a one-output node, or None where the inputs do not fit."""
    if len(node.outputs) != 1:
        return None
    try:
        return np.asarray(operator_of(node).evaluate(node.attrs, *inputs))
    except _COMPUTE_ERRORS:
        return None


def _check_size(graph: Graph, node: Node, values: Sequence[Array | None], limit: int) -> None:
    operator = operator_of(node)
    arrays = [v for v in values if v is not None]
    try:
        if operator.size is not None:
            size = operator.size(node.attrs, values)
        elif operator.kind is Kind.ELEMENTWISE and operator.shapes is None:
            size = math.prod(np.broadcast_shapes(*(a.shape for a in arrays)))
        else:
            size = sum(a.size for a in arrays)
    except _COMPUTE_ERRORS as error:
        shapes = [list(a.shape) for a in arrays]
        raise InvalidModelError(
            f"cannot be computed on shapes {shapes}: {error}", where=graph.where(node)
        ) from error
    if size > limit:
        raise InvalidModelError(
            f"computing this constant takes {size} elements; at most {limit} are allowed at this "
            "context length",
            where=graph.where(node),
        )


def _infer(frozen: Frozen, node: Node, limit: int) -> None:
    """Record shapes and dtypes of a node that depends on the tokens."""
    operator = operator_of(node)
    if operator.kind is Kind.SCATTER:
        target, (name,) = node.inputs[0], node.outputs
        frozen.shapes[name] = _shape(frozen, target) or ()
        frozen.dtypes[name] = _dtype(frozen, target)
        return
    shapes = [_shape(frozen, i) for i in node.inputs]
    try:
        results = _shapes(frozen, node, operator, shapes)
        reach = _reach(frozen, node, operator)
    except _COMPUTE_ERRORS as error:
        listing = [None if s is None else list(s) for s in shapes]
        raise InvalidModelError(
            f"input shapes {listing} contradict each other: {error}",
            where=frozen.graph.where(node),
        ) from error
    if reach is not None:
        frozen.limits[node.outputs[0]] = reach
    if results is None:
        reason = f"{node.label}: its result depends on token values in a way that is not supported"
        frozen.broken.update(dict.fromkeys(filter(None, node.outputs), reason))
        return
    largest = max(limit, _MIN_ELEMENTS * frozen.length)
    # Rows of a table of matrices are never computed all at once.
    if any(math.prod(s) > largest for s in results) and not frozen.is_lookup(node):
        raise InvalidModelError(
            f"has an impossible shape {[list(s) for s in results]}", where=frozen.graph.where(node)
        )
    many = _result_dtypes(frozen, node, operator)
    for index, name in enumerate(node.outputs):
        if not name:
            continue
        if index >= len(results) or index >= len(many):
            raise UnsupportedOpError(
                f"output {name!r} is not supported", where=frozen.graph.where(node)
            )
        shape, dtype = results[index], np.dtype(many[index])
        if 0 in shape and frozen.length in shape:
            # Each token has no features here, as where a rotary embedding leaves none unrotated.
            frozen.constants[name] = Constant.of(name, np.empty(shape, dtype))
        else:
            frozen.shapes[name], frozen.dtypes[name] = shape, dtype


def _reach(frozen: Frozen, node: Node, operator: Operator) -> int | None:
    constants = [frozen.constants.get(i) for i in node.inputs]
    return None if operator.reach is None else operator.reach(node.attrs, constants)


def _result_dtypes(frozen: Frozen, node: Node, operator: Operator) -> tuple[Any, ...]:
    dtypes = [None if not i else _dtype(frozen, i) for i in node.inputs]
    try:
        result = dtypes[0] if operator.result is None else operator.result(dtypes, node.attrs)
    except _COMPUTE_ERRORS as error:
        raise InvalidModelError(
            f"input types {dtypes} do not fit: {error}", where=frozen.graph.where(node)
        ) from error
    return result if isinstance(result, tuple) else (result,) * len(node.outputs)


def _shapes(
    frozen: Frozen, node: Node, operator: Operator, shapes: Sequence[Shape | None]
) -> list[Shape] | None:
    """Output shapes; None where they depend on token values. Raises where inputs do not fit."""
    constants = [frozen.constants.get(i) if i else None for i in node.inputs]
    if frozen.is_lookup(node) and node.op_type == "Gather":
        table, indices = shapes[0], shapes[1]
        assert table is not None and indices is not None
        axis = node.attrs.get("axis", 0)
        axis = axis + len(table) if axis < 0 else axis
        table[axis]  # raises where there is no such axis
        return [table[:axis] + indices + table[axis + 1 :]]
    if frozen.is_lookup(node) and node.op_type == "GatherND":
        table, indices = shapes[0], shapes[1]
        assert table is not None and indices is not None
        if node.attrs.get("batch_dims", 0) or not 0 < indices[-1] <= len(table):
            raise ValueError("rows are looked up by indices that do not fit the table")
        return [indices[:-1] + table[indices[-1] :]]
    if node.op_type == "GatherElements" and constants[1] is None:
        assert shapes[1] is not None
        return [shapes[1]]
    if operator.shapes is not None:
        return operator.shapes(node.attrs, shapes, constants)
    if operator.kind is Kind.ELEMENTWISE:
        given = [s for s in shapes if s is not None]
        return [np.broadcast_shapes(*given)] * max(len(node.outputs), 1)
    if operator.kind is Kind.REDUCE:
        if any(c is None for i, c in zip(node.inputs[1:], constants[1:], strict=True) if i):
            return None
        return [_reduced(node, operator, shapes[0], constants)]
    if operator.kind is not Kind.MOVE:
        return None
    count = len(node.inputs) if operator.data is None else operator.data
    if any(i and c is None for i, c in zip(node.inputs[count:], constants[count:], strict=True)):
        return None
    moved: list[Array | None] = [None if s is None else _nothing(s) for s in shapes]
    moved[count:] = [None if c is None else c.values() for c in constants[count:]]
    return [r.shape for r in compute(frozen.graph, node, moved)]


def _reduced(
    node: Node, operator: Operator, shape: Shape | None, constants: Sequence[Constant | None]
) -> Shape:
    assert operator.axes is not None and shape is not None
    values = [None, *(None if c is None else c.values() for c in constants[1:])]
    axes, keep = operator.axes(node.attrs, values, len(shape))
    if keep is None:
        return shape
    kept = [1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes]
    return tuple(kept)


def _shape(frozen: Frozen, name: str) -> Shape | None:
    if not name:
        return None
    constant = frozen.constants.get(name)
    return frozen.shapes[name] if constant is None else constant.shape


def _dtype(frozen: Frozen, name: str) -> np.dtype[Any]:
    constant = frozen.constants.get(name)
    return frozen.dtypes[name] if constant is None else constant.dtype


def _check_declared(frozen: Frozen) -> None:
    """The shapes that the file declares must not contradict the ones computed here.

    A declared number where the true size follows the sequence is the exporter's example length, and
    is ignored, as onnxruntime does; so are the batch and symbolic dimensions.
    """
    outputs: Mapping[str, Any] = {port.name: port for port in frozen.graph.outputs}
    for name, port in {**frozen.graph.declared, **outputs}.items():
        shape = frozen.shapes.get(name)
        if shape is None or port.dims is None:
            continue
        if len(shape) != len(port.dims):
            raise InvalidModelError(
                f"value {name!r} is declared with dimensions {list(port.dims)}, but has "
                f"{len(shape)} of them",
                where=str(frozen.graph.path),
            )
        last = port.dims[-1] if port.dims else None
        fits = not isinstance(last, int) or last == shape[-1] or shape[-1] % frozen.length == 0
        if not fits:
            raise InvalidModelError(
                f"value {name!r} is declared with dimensions {list(port.dims)}, but its operands "
                f"make it {list(shape)}",
                where=str(frozen.graph.path),
            )
