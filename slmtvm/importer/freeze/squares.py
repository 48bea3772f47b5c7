"""Attention over pieces of a sequence, as Longformer computes it, as attention over all of it.

Exporters spell a window of keys out by what a framework can multiply: queries and keys are cut into
pieces that overlap, each piece's products lie in diagonals that are moved into columns, what does
not exist is padded and masked, and the weights go the same way back to meet pieces of the values.
All of this moves elements. So each softmax's element is one query's product with one key, each
weight is one softmax's element, and from where they lie follows which keys a query sees, exactly.
The same is then written as three nodes over squares of all positions, with a constant that says
so; recognisers know these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.freeze.elements import MOVES, SCALES, SHIFTS, Elements, trace
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.infer import MIN_ELEMENTS, infer
from slmtvm.importer.freeze.square_nodes import Side, Square, SquareNodes
from slmtvm.importer.graph import Array, Node, needed

MASKED = -9900.0  # scores at or below this vanish in the softmax; bfloat16 makes -1e4 -9984
_HIDDEN = float(np.finfo(np.float32).min)


def in_squares(frozen: Frozen) -> Frozen:
    """``frozen`` with attentions over pieces written as attentions over all positions.

    What is not exactly one stays as it is. The result's ``original`` is the graph before.
    """
    producers = {o: n for n in frozen.graph.nodes for o in n.outputs if o in frozen.shapes}
    found = {
        node.outputs[0]: square
        for node in frozen.graph.nodes
        if (square := _square(frozen, producers, node)) is not None
    }
    if not found:
        _check_pads(frozen)
        return frozen
    nodes: list[Node] = []
    for node in frozen.graph.nodes:
        square = found.get(node.outputs[0])
        if square is None:
            nodes.append(node)
            continue
        for written in SquareNodes(frozen, node.outputs[0]).write(square):
            nodes.append(written)
            if written.outputs[0] != node.outputs[0]:
                infer(frozen, written, max(frozen.max_elements, MIN_ELEMENTS))
    graph = frozen.graph
    wanted = [port.name for port in graph.outputs] + [d.condition for d in graph.decisions]
    kept = needed(nodes, wanted)
    made = {o for node in kept for o in node.outputs} | {port.name for port in graph.inputs}
    result = replace(
        frozen,
        graph=replace(graph, nodes=kept),
        before=graph,
        shapes={name: shape for name, shape in frozen.shapes.items() if name in made},
        dtypes={name: dtype for name, dtype in frozen.dtypes.items() if name in made},
    )
    _check_pads(result)
    return result


def _check_pads(frozen: Frozen) -> None:
    for node in frozen.graph.nodes:
        if node.op_type == "Pad" and node.outputs[0] in frozen.shapes:
            raise UnsupportedOpError(
                "pads values that depend on tokens, as attention over pieces of a sequence does "
                "(Longformer), but each score is not one query's product with one key, so that it "
                "is another function, or one with global tokens, which are not supported",
                where=frozen.graph.where(node),
            )


def _square(frozen: Frozen, producers: Mapping[str, Node], node: Node) -> Square | None:
    n = frozen.length
    if node.op_type != "MatMul" or any(i not in frozen.shapes for i in node.inputs):
        return None
    if node.outputs[0] not in frozen.shapes or frozen.shapes[node.inputs[0]][-2:] == (n, n):
        return None
    weights = trace(frozen, producers, node.inputs[0], MOVES | SCALES)
    softmax = producers.get(weights[0]) if weights else None
    if weights is None or softmax is None or softmax.op_type != "Softmax":
        return None
    shape = frozen.shapes[weights[0]]
    if softmax.attrs.get("axis", -1 if softmax.version >= 13 else 1) not in (-1, len(shape) - 1):
        return None
    scores = trace(frozen, producers, softmax.inputs[0], MOVES | SCALES | SHIFTS)
    product = producers.get(scores[0]) if scores else None
    if scores is None or product is None or product.op_type != "MatMul":
        return None
    if any(i not in frozen.shapes for i in product.inputs):
        return None
    lead = frozen.shapes[scores[0]][:-2]
    q = _side(frozen, producers, product.inputs[0], lead, turned=False)
    k = _side(frozen, producers, product.inputs[1], lead, turned=True)
    out = frozen.shapes[node.outputs[0]]
    v = _side(frozen, producers, node.inputs[1], out[:-2], turned=False, filled=True)
    if q is None or k is None or v is None or v.factor != 1:
        return None
    left = frozen.shapes[node.inputs[0]]
    taken = weights[1].each(lambda part: np.broadcast_to(part, (*out[:-2], *left[-2:])))
    return _assemble(n, (q, k, v), scores[1], taken)


def _side(
    frozen: Frozen,
    producers: Mapping[str, Node],
    value: str,
    lead: tuple[int, ...],
    *,
    turned: bool,
    filled: bool = False,
) -> Side | None:
    """The operand ``value``; ``filled``: what comes from no token may be any finite number."""
    traced = trace(frozen, producers, value, MOVES | SCALES)
    if traced is None:
        return None
    source, found = traced
    shape = frozen.shapes[source]
    axes = [axis for axis, size in enumerate(shape[:-1]) if size == frozen.length]
    if len(axes) != 1 or any(size != 1 for a, size in enumerate(shape[:-1]) if a != axes[0]):
        return None
    found = found.each(lambda part: np.swapaxes(part, -1, -2) if turned else part)
    found = found.each(lambda part: np.broadcast_to(part, (*lead, *part.shape[-2:])))
    known = found.index >= 0
    factors = np.unique(found.factor[known])
    if factors.size != 1 or found.added[known].any() or not np.isfinite(found.added).all():
        return None
    if not filled and found.added.any():
        return None
    if (known != known[..., :1]).any():
        return None
    token, feature = np.divmod(found.index, shape[-1])
    if (token != token[..., :1]).any():
        return None
    whole = known[..., 0]
    first, of_line = np.unique(feature[..., 0][whole], return_inverse=True)
    lines = feature[whole]
    features = np.zeros((first.size, lines.shape[-1]), np.int64)
    features[of_line] = lines
    if (features[of_line] != lines).any():
        return None
    head = np.full(whole.shape, -1, np.int64)
    head[whole] = of_line
    return Side(
        source, axes[0], np.where(whole, token[..., 0], -1), head, features, float(factors[0])
    )


def _assemble(
    n: int, sides: tuple[Side, Side, Side], scores: Elements, weights: Elements
) -> Square | None:
    q, k, v = sides
    heads, columns = len(q.features), scores.index.shape[-1]
    rows, keys = q.token.shape[-1], k.token.shape[-1]
    index, added = scores.index.reshape(-1, columns), scores.added.reshape(-1, columns)
    some = index >= 0
    at = np.where(some, index, 0)
    line, key = at // keys, at // (rows * keys) * keys + at % keys
    token, head = q.token.reshape(-1)[line], q.head.reshape(-1)[line]
    other, of_key = k.token.reshape(-1)[key], k.head.reshape(-1)[key]
    some &= (token >= 0) & (other >= 0)
    seen = some & (added > MASKED)
    if np.isnan(added).any() or (~some & (added > MASKED)).any():
        return None
    factors = np.unique(scores.factor.reshape(-1, columns)[seen])
    key_head = _mapped(heads, head[seen], of_key[seen])
    # A line of no key that is seen, of a hidden token, is known by those that are not.
    places = _of_lines(np.where(seen.any(axis=1, keepdims=True), seen, some), head * n + token)
    if factors.size != 1 or key_head is None or places is None:
        return None
    if not np.array_equal(np.sort(places), np.arange(heads * n)):
        return None
    pair = np.broadcast_to(places[:, None], index.shape)[seen] * n + other[seen]
    if np.unique(pair).size != pair.size:
        return None
    square = np.full(heads * n * n, _HIDDEN)
    square[pair] = added[seen]
    # The other product: each weight that is not zero meets its own key's value.
    width = weights.index.shape[-1]
    taken = weights.index.reshape(-1, width)
    from_softmax = taken >= 0
    element = np.where(from_softmax, taken, 0)
    if weights.added.any() or len(taken) != heads * n:
        return None
    counts = from_softmax & seen.reshape(-1)[element]
    value = np.arange(len(taken))[:, None] // weights.index.shape[-2] * width + np.arange(width)
    value_token, value_head = v.token.reshape(-1)[value], v.head.reshape(-1)[value]
    if (counts & (value_token != other.reshape(-1)[element])).any():
        return None
    own = _of_lines(
        np.where(counts.any(axis=1, keepdims=True), counts, from_softmax), element // columns
    )
    if own is None or (counts & (element // columns != own[:, None])).any():
        return None
    if (counts.sum(axis=1) != seen.sum(axis=1)[own]).any():
        return None
    once = element[counts]
    if np.unique(once).size != once.size:
        return None
    order = places[own]
    if not np.array_equal(np.sort(order), np.arange(heads * n)):
        return None
    head_of_row = np.broadcast_to((order // n)[:, None], taken.shape)
    value_heads = _mapped(heads, head_of_row[counts], value_head[counts])
    factor = weights.factor.reshape(-1, width)
    share = _of_lines(np.where(counts.any(axis=1, keepdims=True), counts, from_softmax), factor)
    if value_heads is None or share is None:
        return None
    kept = np.empty(heads * n)
    kept[order] = share
    return Square(
        sides,
        (np.arange(heads), key_head, value_heads),
        float(factors[0]) * q.factor * k.factor,
        square.reshape(heads, n, n),
        kept.reshape(heads, n, 1),
        order,
    )


def _of_lines(chosen: Array, numbers: Array) -> Array | None:
    """The one of ``numbers`` that each line has where it is ``chosen``; None where there are
    several, or none."""
    if not chosen.any(axis=1).all():
        return None
    first = numbers[np.arange(len(numbers)), chosen.argmax(axis=1)]
    return None if (chosen & (numbers != first[:, None])).any() else first


def _mapped(count: int, keys: Array, values: Array) -> Array | None:
    """The one of ``values`` that goes with each of ``count`` keys; None where several do."""
    found = np.full(count, -1, np.int64)
    found[keys] = values
    return found if (found >= 0).all() and (found[keys] == values).all() else None
