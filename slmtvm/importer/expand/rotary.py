"""RotaryEmbedding of ONNX, from operator set 23 on."""

from __future__ import annotations

from collections.abc import Sequence

from slmtvm.importer.expand.registry import expansion
from slmtvm.importer.expand.site import Site


@expansion("RotaryEmbedding", 23)
def rotary_embedding(site: Site) -> Sequence[str]:
    """Inputs: x, tables of cosines and sines, and the positions of their rows.

    x is (batch, heads, length, head_dim), or (batch, length, heads * head_dim) with the number of
    heads as an attribute. The tables are (positions, r / 2), or (batch, length, r / 2) where no
    positions are given; the first r features of a head are rotated.
    """
    x, cos, sin, positions = (site.input(i) for i in range(4))
    attrs = site.attrs
    by_head = site.rank(x) == 4
    heads = attrs.get("num_heads", 0)
    if by_head:
        turned = site.op("Transpose", x, perm=(0, 2, 1, 3))
    else:
        width = site.shape(x)[-1]
        if heads < 1 or width % heads:
            raise site.invalid(f"{width} features are not {heads} heads")
        turned = site.op("Reshape", x, site.ints(0, 0, heads, width // heads))
    head_dim = site.shape(turned)[-1]
    rotated = attrs.get("rotary_embedding_dim", 0) or head_dim
    if not 0 < rotated <= head_dim or rotated % 2:
        raise site.invalid(f"{rotated} rotated features of heads of {head_dim}")
    tables = []
    for table in (cos, sin):
        rows = site.op("Gather", table, positions) if positions else table
        tables.append(site.op("Unsqueeze", rows, site.ints(2)))
    passed = ""
    part = turned
    if rotated < head_dim:
        sizes = site.ints(rotated, head_dim - rotated)
        part, passed = site.op("Split", turned, sizes, axis=3, outputs=2)
    y = _rotate(site, part, tables[0], tables[1], rotated, bool(attrs.get("interleaved", 0)))
    if passed:
        y = site.op("Concat", y, passed, axis=3)
    if by_head:
        return [site.op("Transpose", y, perm=(0, 2, 1, 3))]
    return [site.op("Reshape", y, site.ints(0, 0, heads * head_dim))]


def _rotate(site: Site, x: str, cos: str, sin: str, width: int, interleaved: bool) -> str:
    """(a cos - b sin, b cos + a sin) of pairs (a, b), which lie side by side or halves apart."""
    if interleaved:
        pairs = site.op("Reshape", x, site.ints(0, 0, 0, width // 2, 2))
        parts = site.op("Split", pairs, axis=4, outputs=2, num_outputs=2)
        a, b = (site.op("Squeeze", part, site.ints(4)) for part in parts)
    else:
        a, b = site.op("Split", x, axis=3, outputs=2, num_outputs=2)
    first = site.op("Sub", site.op("Mul", a, cos), site.op("Mul", b, sin))
    second = site.op("Add", site.op("Mul", b, cos), site.op("Mul", a, sin))
    if not interleaved:
        return str(site.op("Concat", first, second, axis=3))
    both = [site.op("Unsqueeze", part, site.ints(4)) for part in (first, second)]
    return str(site.op("Reshape", site.op("Concat", *both, axis=4), site.ints(0, 0, 0, width)))
