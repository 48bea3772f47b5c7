"""Operators that are whole layers become the steps that the layer is written with elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators.fused import GROUP_QUERY_INPUTS, SPARSE_INPUTS
from slmtvm.importer.recognise.attention.attention import head_bias, head_mask
from slmtvm.importer.recognise.attention.scale import scaled_queries
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.masks import MASKED, Mask, read_mask
from slmtvm.importer.recognise.rows.pointwise import operand
from slmtvm.importer.recognise.steps import Attention, Elementwise, Norm, Param, Rope, Rows, Step

_SKIP_EPSILON = 1e-12  # the operators' default
_QK_EPSILON = 1e-6  # of GroupQueryAttention's norms
_SKIP_SUM = 3  # the output that holds the sum
_SAME_TABLE = 1e-6

_UNSUPPORTED_INPUTS = {
    "k_scale": "a quantized cache",
    "v_scale": "a quantized cache",
}
_UNSUPPORTED_ATTRIBUTES: dict[str, tuple[tuple[object, ...], str]] = {
    # name: (values that mean there is none, what it is)
    "k_quant_type": (("NONE", ""), "a quantized cache"),
    "v_quant_type": (("NONE", ""), "a quantized cache"),
}


_ATTENTIONS = {"GroupQueryAttention": GROUP_QUERY_INPUTS, "SparseAttention": SPARSE_INPUTS}


def match_fused(cover: Cover, node: Node, value: str) -> Step:
    """What the output ``value`` of ``node`` is; steps for what lies inside the layer are added.

    Raises UnsupportedOpError for a variant of the operator that cannot be compiled.
    """
    if node.op_type in _ATTENTIONS:
        return _group_query(cover, node)
    if node.op_type == "RotaryEmbedding":
        return _rotary(cover, node)
    return _skip_norm(cover, node, value)


def _group_query(cover: Cover, node: Node) -> Attention:
    frame, attrs = cover.frame, node.attrs
    where = frame.graph.where(node)
    names = _ATTENTIONS[node.op_type]
    given = {n: v for n, v in zip(names, node.inputs, strict=False) if v}
    _refuse_variants(node, given, where)
    for frozen in (frame.small, frame.full):
        _check_starts_empty(frozen, given, names, where)
    heads, kv_heads = attrs["num_heads"], attrs["kv_num_heads"]
    head_dim = frame.features(node.outputs[0]) // heads
    for name in ("query", "key", "value"):
        if name in given:
            _check_axis(cover, given[name], 1, where)
    width, kv_width = heads * head_dim, kv_heads * head_dim
    if "key" in given:
        q, k, v = (cover.need(given[name]) for name in ("query", "key", "value"))
    else:
        ends = (0, width, width + kv_width, width + 2 * kv_width)
        q, k, v = (cover.part(given["query"], *part) for part in pairwise(ends))
    name = node.outputs[0]
    q = _normed(cover, node, q, given.get("q_norm_weight"), f"{name}#q_norm", heads)
    k = _normed(cover, node, k, given.get("k_norm_weight"), f"{name}#k_norm", kv_heads)
    if attrs.get("do_rotary", 0):
        cos, sin = _tables(
            cover, given.get("cos_cache"), given.get("sin_cache"), given.get("position_ids"), where,
            first_position_only=True,
        )  # fmt: skip
        _check_rotated(cos, head_dim, where)
        interleaved = bool(attrs.get("rotary_interleaved", 0))
        q = cover.add(f"{name}#q", Rope(q, cos, sin, heads, head_dim, interleaved))
        k = cover.add(f"{name}#k", Rope(k, cos, sin, kv_heads, head_dim, interleaved))
    scale = float(attrs.get("scale", 0.0)) or 1 / math.sqrt(head_dim)
    q, scale, softcap = scaled_queries(cover, q, scale, float(attrs.get("softcap", 0.0)), where)
    if node.op_type == "SparseAttention":
        mask = _mask_of_layouts(cover, node, given, where)
    else:
        mask = _mask(cover, node, given.get("attention_bias"), where)
    return Attention(
        q,
        k,
        v,
        heads,
        kv_heads,
        head_dim,
        scale,
        mask.kind,
        mask.window,
        mask.chunk,
        softcap,
        head_bias(cover, mask.bias, heads, where),
        mask.bias_by,
        _sinks(cover, node, given.get("head_sink"), heads, where),
        head_mask(cover, mask.visible, heads, where),
    )


def _sinks(cover: Cover, node: Node, name: str | None, heads: int, where: str) -> Param | None:
    """The score of no key that each head's softmax counts; 0 where it is "smooth" without one."""
    if name is not None:
        return cover.vector(name, heads, 1.0, where)
    if node.attrs.get("smooth_softmax", 0) in (0, -1):
        return None
    return Param(f"{node.outputs[0]}#sinks", np.zeros(heads, np.float32))


def _mask(cover: Cover, node: Node, bias: str | None, where: str) -> Mask:
    """What the attention adds to its scores: a causal mask, a window, a constant bias."""
    frozen = cover.frame.full
    causal, window = node.attrs.get("causal", 1), node.attrs.get("local_window_size", -1)
    if causal and not bias and window != 0:
        return Mask("causal", window if 0 < window < frozen.length else 0)
    rows, columns = np.indices((frozen.length, frozen.length), sparse=True)
    visible = columns <= rows if causal else columns >= 0 * rows
    if window >= 0:
        visible = visible & (rows - columns < window)
    added = np.zeros((1, *visible.shape), np.float32)
    if bias:
        constant = frozen.constants.get(bias)
        if constant is None:
            raise UnsupportedOpError("its attention_bias depends on the tokens", where=where)
        values = constant.values(table=True).astype(np.float32, copy=False)
        if values.shape[-2:] != visible.shape or values.ndim != 4 or values.shape[0] != 1:
            raise InvalidModelError(
                f"attention_bias of shape {list(values.shape)} for {frozen.length} tokens",
                where=where,
            )
        added = values[0]
    visible = visible & (added > MASKED)
    return read_mask(np.where(visible, added, 0), visible, where)


def _mask_of_layouts(cover: Cover, node: Node, given: Mapping[str, str], where: str) -> Mask:
    """Which positions a query of each head sees: those before it, in blocks that its layout has.

    Layouts are in compressed rows: the blocks of row r stand at begins[r] .. begins[r + 1]. Head h
    takes layout h modulo their number.
    """
    frozen, size = cover.frame.full, int(node.attrs["sparse_block_size"])
    tables = [
        frozen.constants.get(given[name]) for name in ("block_row_indices", "block_col_indices")
    ]
    if any(t is None or len(t.shape) != 2 or t.dtype.kind not in "iu" for t in tables):
        raise UnsupportedOpError(
            "its layouts of blocks must be constants, integers (layouts, n)", where=where
        )
    begins, blocks = (t.values().astype(np.int64) for t in tables if t is not None)
    heads, rows = node.attrs["num_heads"], begins.shape[1] - 1
    if len(begins) != len(blocks) or not len(begins) or heads % len(begins) or size < 1:
        raise InvalidModelError(
            f"layouts of blocks of {size}, rows {list(begins.shape)} and columns "
            f"{list(blocks.shape)}, for {heads} heads",
            where=where,
        )
    seen = np.zeros((len(begins), rows, rows), bool)
    for layout, (bounds, columns) in enumerate(zip(begins, blocks, strict=True)):
        for row in range(rows):
            first, last = bounds[row], bounds[row + 1]
            own = columns[max(first, 0) : last]
            if not 0 <= first <= last <= len(columns) or (own < 0).any() or (own >= rows).any():
                raise InvalidModelError(
                    f"row {row} of layout {layout} of its blocks has {own.tolist()} of {rows}",
                    where=where,
                )
            seen[layout, row, own] = True
    n = frozen.length
    if n > rows * size:
        raise UnsupportedOpError(
            f"{n} tokens; its layouts of blocks serve {rows * size}", where=where
        )
    places = np.arange(n) // size
    visible = seen[:, places[:, None], places] & np.tri(n, dtype=bool)
    if len(visible) > 1:
        visible = np.tile(visible, (heads // len(visible), 1, 1))
    return read_mask(np.zeros(visible.shape, np.float32), visible, where)


def _normed(cover: Cover, node: Node, x: Rows, weight: str | None, name: str, heads: int) -> Rows:
    """``x`` with each of its heads normed on its own, where there is a weight."""
    if not weight:
        return x
    where = cover.frame.graph.where(node)
    head_dim = cover.frame.features(node.outputs[0]) // node.attrs["num_heads"]
    eps = float(node.attrs.get("qk_norm_epsilon", _QK_EPSILON))
    gamma = cover.vector(weight, head_dim, 1.0, where)
    return cover.add(name, Norm(x, gamma, None, eps, heads))


def _refuse_variants(node: Node, given: Mapping[str, str], where: str) -> None:
    found = [what for name, what in _UNSUPPORTED_INPUTS.items() if name in given]
    for name, (none, what) in _UNSUPPORTED_ATTRIBUTES.items():
        if node.attrs.get(name, none[0]) not in none:
            found.append(what)
    if found:
        raise UnsupportedOpError(
            f"attention with {' and '.join(dict.fromkeys(found))} is not supported", where=where
        )


def _check_starts_empty(
    frozen: Frozen, given: Mapping[str, str], names: Sequence[str], where: str
) -> None:
    """Raise where the lengths do not say that these tokens are all there are."""
    lengths = {
        "seqlens_k": frozen.length - 1,
        "total_sequence_length": frozen.length,
        "key_total_sequence_lengths": frozen.length,
    }
    for name, expected in lengths.items():
        if name not in names:
            continue
        constant = frozen.constants.get(given.get(name, ""))
        found = [] if constant is None else constant.values().reshape(-1)[:2].tolist()
        if found != [expected]:
            raise UnsupportedOpError(
                f"its {name} must follow from the attention mask or the length of the tokens: "
                f"{expected} for {frozen.length} tokens without a past, found "
                f"{found or 'no constant'}",
                where=where,
            )
    for name in ("past_key", "past_value"):
        if name in given and given[name] not in frozen.constants:
            raise UnsupportedOpError(f"its {name} is not an input of the graph", where=where)


def _check_axis(cover: Cover, value: str, axis: int, where: str) -> None:
    if value not in cover.frame.small.shapes:
        raise UnsupportedOpError(f"its input {value!r} depends on no tokens", where=where)
    if cover.frame.sequence_axis(value) != axis:
        raise UnsupportedOpError(
            f"{value!r} does not have its tokens along axis {axis}", where=cover.frame.where(value)
        )


def _rotary(cover: Cover, node: Node) -> Rope:
    frame, attrs = cover.frame, node.attrs
    where = frame.graph.where(node)
    x, positions, cos_name, sin_name = node.inputs
    # A packed batch is one sequence with positions of its own, and onnxruntime ignores the scale.
    shape = frame.small.shapes[node.outputs[0]]
    _check_axis(cover, x, len(shape) - 2, where)
    cos, sin = _tables(cover, cos_name, sin_name, positions, where)
    width = frame.features(x)
    if len(shape) == 4:
        head_dim = shape[3]
    elif attrs.get("num_heads", 0) > 0:
        head_dim = width // attrs["num_heads"]
    else:
        head_dim = 2 * cos.array.shape[1]
    _check_rotated(cos, head_dim, where)
    if width % head_dim:
        raise InvalidModelError(f"{width} features are not heads of {head_dim}", where=where)
    interleaved = bool(attrs.get("interleaved", 0))
    return Rope(cover.need(x), cos, sin, width // head_dim, head_dim, interleaved)


def _check_rotated(cos: Param, head_dim: int, where: str) -> None:
    rotated = 2 * cos.array.shape[1]
    if not 0 < rotated <= head_dim:
        raise InvalidModelError(
            f"tables that rotate {rotated} features of heads of {head_dim}", where=where
        )


def _tables(
    cover: Cover,
    cos: str | None,
    sin: str | None,
    positions: str | None,
    where: str,
    *,
    first_position_only: bool = False,
) -> tuple[Param, Param]:
    """The rows of both tables for the positions of the whole context."""
    tables = []
    for title, name in (("rope.cos", cos), ("rope.sin", sin)):
        short, long = (
            _table_rows(frozen, name, positions, where, first_position_only)
            for frozen in (cover.frame.small, cover.frame.full)
        )
        if np.abs(long[: len(short)] - short).max(initial=0) > _SAME_TABLE:
            raise UnsupportedOpError(
                f"table {name!r} changes with the sequence length, not only with the position",
                where=where,
            )
        tables.append(cover.table(title, long))
    if tables[0].array.shape != tables[1].array.shape:
        raise InvalidModelError("its tables of cosines and sines differ in shape", where=where)
    return tables[0], tables[1]


def _table_rows(
    frozen: Frozen, name: str | None, positions: str | None, where: str, first_only: bool
) -> Array:
    table = frozen.constants.get(name or "")
    if table is None or len(table.shape) != 2 or table.dtype.kind in "iub":
        raise UnsupportedOpError(
            f"its table {name!r} must be a constant matrix of numbers", where=where
        )
    places = np.arange(frozen.length)
    if positions is not None:
        given = frozen.constants.get(positions)
        if given is None or given.dtype.kind not in "iu":
            raise UnsupportedOpError(
                "its positions must be integers that do not depend on the tokens", where=where
            )
        values = given.values().reshape(-1)
        places = values if values.size == frozen.length and not first_only else places + values[0]
    first, last = int(places.min()), int(places.max())
    if first < 0 or last >= table.shape[0]:
        raise UnsupportedOpError(
            f"positions {first} to {last}; its table {name!r} has {table.shape[0]} rows",
            where=where,
        )
    values = table.values(table=True)
    if (places == np.arange(first, first + places.size)).all():
        rows = values[first : last + 1]  # a view of the file
    else:
        rows = values[places]
    return rows.astype(np.float32, copy=False)


def _skip_norm(cover: Cover, node: Node, value: str) -> Step:
    """``norm(input + skip + bias)``: the sum, or the norm over it."""
    frame = cover.frame
    where = frame.graph.where(node)
    width = frame.features(value)
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    names = ("gamma", "bias") if simplified else ("gamma", "beta", "bias")
    given = {n: i for n, i in zip(names, node.inputs[2:], strict=False) if i}
    total = Elementwise(
        "add", (operand(cover, node.inputs[0], value), operand(cover, node.inputs[1], value))
    )
    bias = given.get("bias")
    if bias is not None:
        inner = cover.add(f"{node.outputs[0]}#skip", total)
        total = Elementwise("add", (inner, cover.vector(bias, width, 1.0, where)))
    if value in node.outputs[_SKIP_SUM:]:
        return total
    if value != node.outputs[0]:
        raise UnsupportedOpError(f"its output {value!r} is not supported", where=where)
    if len(node.outputs) > _SKIP_SUM and node.outputs[_SKIP_SUM]:
        rows = cover.need(node.outputs[_SKIP_SUM])
    else:
        rows = cover.add(f"{value}#sum", total)
    gamma = cover.vector(given["gamma"], width, 1.0, where)
    beta = None
    if not simplified:
        shift = given.get("beta")
        beta = (
            Param(f"{value}.beta", np.zeros(width, np.float32))
            if shift is None
            else cover.vector(shift, width, 1.0, where)
        )
    return Norm(rows, gamma, beta, float(node.attrs.get("epsilon", _SKIP_EPSILON)))
