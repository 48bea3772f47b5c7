"""Which layers keep 8 bits: those where 4 bits cost the most accuracy for the bytes they save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmtvm.errors import SlmError
from slmtvm.quantize.layers import Layer

DEFAULT_SHARE = 0.25  # of the bytes between all layers in 4 and all in 8 bits


def block_bytes(shape: tuple[int, int], bits: int, group: int, symmetric: bool) -> int:
    """Bytes of a weight (k, n) in MatMulNBits with float32 scales."""
    k, n = shape
    blocks = -(-k // group)
    zero_points = 0 if symmetric else -(-blocks * bits // 8)
    return n * (blocks * group * bits // 8 + 4 * blocks + zero_points)


def choose_bits(
    layers: Sequence[Layer],
    error_saved: Mapping[str, float],
    *,
    group: int,
    symmetric: bool,
    budget: int | None,
) -> dict[str, int]:
    """4 or 8 bits for each layer.

    ``error_saved``: by how much 8 bits reduce a layer's error. ``budget``: bytes for all layers
    together; by default DEFAULT_SHARE of the way from all in 4 to all in 8 bits. Greedy by error
    saved for each byte, which is within one layer of the best choice. Raises SlmError where not
    even 4 bits everywhere fit.
    """

    def size(layer: Layer, bits: int) -> int:
        return block_bytes(layer.shape, bits, group, symmetric)

    least, most = (sum(size(layer, bits) for layer in layers) for bits in (4, 8))
    limit = least + int(DEFAULT_SHARE * (most - least)) if budget is None else budget
    if limit < least:
        raise SlmError(
            f"the layers take {least:,} bytes in 4 bits with groups of {group}, of which the size "
            f"asked for leaves {max(limit, 0):,}; larger groups or quantized embeddings take less"
        )
    extra = {layer.name: size(layer, 8) - size(layer, 4) for layer in layers}
    order = sorted(
        layers, key=lambda layer: error_saved[layer.name] / extra[layer.name], reverse=True
    )
    bits = {layer.name: 4 for layer in layers}
    left = limit - least
    for layer in order:
        if extra[layer.name] <= left:
            bits[layer.name] = 8
            left -= extra[layer.name]
    return bits
