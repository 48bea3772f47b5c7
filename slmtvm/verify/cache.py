"""What an ONNX file says of its cache elsewhere than at its inputs."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

_PAST = (3, 4)  # where GroupQueryAttention and SparseAttention take past keys and values
_LAYOUT_ROWS = 5  # where SparseAttention takes the rows of its layouts


def cache_sizes(graph: GraphProto) -> dict[str, tuple[int, int]]:
    """(positions, head_dim) of each empty past input that a GroupQueryAttention reads.

    onnxruntime-genai's builder leaves head_dim symbolic at the input; the declared width of the
    attention's result tells it. A cache of a window's size has room for the window though empty.
    """
    shapes = {v.name: v.type.tensor_type.shape.dim for v in graph.value_info}
    found: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.op_type != "GroupQueryAttention" or not shapes.get(node.output[0]):
            continue
        heads, width = _integer(node, "num_heads"), shapes[node.output[0]][-1].dim_value
        sliding = _integer(node, "sliding_window_cache") > 0
        positions = max(_integer(node, "local_window_size"), 0) if sliding else 0
        if heads > 0 and width % heads == 0:
            sizes = (positions, width // heads)
            found.update({node.input[i]: sizes for i in _PAST if i < len(node.input)})
    return found


def shared_caches(graph: GraphProto) -> dict[str, tuple[str, int]]:
    """Of each past input that a SparseAttention reads the output that is the same buffer, as
    onnxruntime wants it, and the positions of its layouts."""
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    found: dict[str, tuple[str, int]] = {}
    for node in graph.node:
        if node.op_type != "SparseAttention" or len(node.input) <= _LAYOUT_ROWS:
            continue
        rows = shapes.get(node.input[_LAYOUT_ROWS], [1])[-1] - 1
        positions = rows * _integer(node, "sparse_block_size")
        pairs = zip(_PAST, node.output[1:], strict=False)
        found |= {node.input[past]: (present, positions) for past, present in pairs}
    return found


def _integer(node: NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)
