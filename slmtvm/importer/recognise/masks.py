"""What is added to an attention's scores before the softmax: a mask, and a bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.freeze.squares import MASKED as MASKED
from slmtvm.importer.graph import Array
from slmtvm.schedules.vector import LANES

HIDDEN = np.float32(-1e9)  # a bias that hides: far below every score, and finite
_MOST = 0.75  # of all blocks of keys: where more are seen, a mask by distance is a bias
_ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of the largest bias, as the file computes it


@dataclass(frozen=True, eq=False)
class Mask:
    """``kind`` "causal" or "bidirectional"; the others as ``ir.ops.attention`` has them.

    A bias of one row holds for every head, as does a ``visible`` of one square, bool
    (heads or 1, n, n).
    """

    kind: str
    window: int = 0
    bias: Array | None = None
    bias_by: str = "distance"
    chunk: int = 0
    visible: Array | None = None

    def square(self, n: int) -> Array:
        """What it adds among the first ``n`` positions, float (heads or 1, n, n)."""
        behind = np.subtract.outer(np.arange(n), np.arange(n))
        added = np.zeros((1, n, n))
        if self.bias is not None and self.bias_by == "key":
            added = np.broadcast_to(self.bias[:, None, :n], (len(self.bias), n, n))
        elif self.bias is not None:
            last = self.bias.shape[1] - 1
            own = last if self.kind == "causal" else last // 2
            added = self.bias[:, np.minimum(own - behind, last)]
        hidden = (behind < 0) & (self.kind == "causal")
        hidden |= (behind >= self.window) & (self.window > 0)
        if self.chunk:
            hidden |= np.subtract.outer(*[np.arange(n) // self.chunk] * 2) != 0
        if self.visible is not None:
            hidden = hidden | ~self.visible[:, :n, :n]
        return np.where(hidden, HIDDEN, added)


def read_mask(added: Array, visible: Array, where: str, *, exact: bool = False) -> Mask:
    """The mask that adds ``added`` where positions are visible, and hides all others.

    added: float (heads or 1, n, n), row i is what position i sees; visible: bool, of its shape.
    ``exact``: sums are rounded, so that what is the same for all of a row's scores matters too.
    A mask of any other pattern is its ``visible``; so is one by distance that leaves out many
    blocks of keys, which kernels skip then. Raises UnsupportedOpError for a bias that follows
    neither from the distance nor from the key, or with a mask that does not, and where a position
    does not see itself.
    """
    n = visible.shape[-1]
    if not visible.any():
        raise UnsupportedOpError("the mask hides every position", where=where)
    kind = "bidirectional" if np.triu(visible.any(axis=0), 1).any() else "causal"
    window = _window(visible) if kind == "causal" else 0 if visible.all() else None
    biased = bool((added[visible] != 0).any())
    if window is not None and not biased:
        return Mask(kind, window)
    chunk = 0 if biased or window is not None else _chunk(visible, kind)
    if chunk:
        return Mask(kind, chunk=chunk)
    seen = _by_distance(visible, kind) if window is None else np.ones((1, 2 * n - 1), bool)
    if not biased and window is None and (seen is None or _share_of_blocks(visible, kind) < _MOST):
        _check_own(visible, where)
        return Mask(kind, visible=visible)
    if seen is None or not seen[:, n - 1].all():
        raise UnsupportedOpError(
            "which positions the mask hides depends on more than their distance, where a bias is "
            "added too, which is not supported; without a bias any pattern is, and masks and "
            "biases that depend on head and distance are",
            where=where,
        )
    table = _bias_by_distance(added, visible, kind, exact=exact)
    if table is None:
        by_key = _bias_by_key(added, visible) if window is not None else None
        if by_key is None:
            raise UnsupportedOpError(
                "what is added to the scores depends on more than head and distance, or head and "
                "the key's position, which is not supported",
                where=where,
            )
        return Mask(kind, window or 0, by_key, "key")
    if exact and not seen.all():
        raise UnsupportedOpError(
            "scores are rounded after a cap or a bias and before a mask that hides by distance, "
            "which is not supported; exclude these operators when quantizing",
            where=where,
        )
    full = np.where(seen, table, HIDDEN)
    columns = slice(0, n) if kind == "causal" else slice(None)
    return Mask(kind, window or 0, np.ascontiguousarray(full[:, columns], np.float32))


def _check_own(visible: Array, where: str) -> None:
    """Raise where a position does not see itself: it might see none in a shorter sequence."""
    places = np.arange(visible.shape[-1])
    blind = np.flatnonzero(~visible[:, places, places].all(axis=0))
    if blind.size:
        raise UnsupportedOpError(
            f"the mask hides position {blind[0]} from itself (a padded sequence?), which is not "
            "supported",
            where=where,
        )


def _share_of_blocks(visible: Array, kind: str) -> float:
    """Which part of all blocks of positions holds one that is seen."""
    heads, n = visible.shape[0], visible.shape[-1]
    count = -(-n // LANES)
    padded = np.zeros((heads, count * LANES, count * LANES), bool)
    padded[:, :n, :n] = visible
    seen = padded.reshape(heads, count, LANES, count, LANES).any(axis=(2, 4))
    every = count * (count + 1) // 2 if kind == "causal" else count * count
    return float(seen.sum()) / (heads * every)


def _window(visible: Array) -> int | None:
    """The window of a causal mask, 0 for none; None where it is no window."""
    n = visible.shape[-1]
    sizes = visible.sum(axis=-1)
    window = int(sizes[0, -1])
    expected = np.minimum(np.arange(n) + 1, window)
    places = np.arange(n)
    first = visible.argmax(axis=-1)
    regular = (sizes == expected).all() and (first == places + 1 - expected).all()
    if not regular or not visible[:, places, places].all():
        return None
    return 0 if window == n else window


def _chunk(visible: Array, kind: str) -> int:
    """The size of the blocks of positions that see each other alone; 0 where it is otherwise."""
    n = visible.shape[-1]
    size = int(visible[0, :, 0].sum())
    if not 1 < size < n:
        return 0
    block = np.arange(n) // size
    expected = block[:, None] == block
    if kind == "causal":
        expected &= np.tri(n, dtype=bool)
    return size if (visible == expected).all() else 0


def _table(square: Array, kind: str) -> Array:
    """(heads, 2 n - 1) values by ``n - 1 + j - i``, from the last and the first row."""
    ahead = square[:, 0, 1:]
    if kind == "causal":
        ahead = np.zeros_like(ahead)
    return np.concatenate([square[:, -1], ahead], axis=1)


def _by_distance(visible: Array, kind: str) -> Array | None:
    """Which distances are visible, bool (heads, 2 n - 1); None where more than these counts."""
    n = visible.shape[-1]
    table = _table(visible, kind)
    same = all((table[:, n - 1 - i : 2 * n - 1 - i] == visible[:, i]).all() for i in range(n))
    return table if same else None


def _bias_by_distance(added: Array, visible: Array, kind: str, *, exact: bool) -> Array | None:
    """The bias of each distance, float (heads, 2 n - 1); None where more than these counts.

    What is added to all scores of a position does not change its softmax, so a bias that grows
    with the key's position alone (ALiBi, as BLOOM has it) is one by distance too, unless it must be
    ``exact``.
    """
    n = added.shape[-1]
    bias = np.where(visible, added, 0)
    tolerance = _tolerance(bias)
    own = np.einsum("hii->hi", bias)
    for shift in (np.zeros_like(own), own)[: 1 if exact else 2]:
        table = _table(bias - shift[..., None], kind)
        if all(
            (
                np.abs(table[:, n - 1 - i : 2 * n - 1 - i] + shift[:, i, None] - bias[:, i])
                <= tolerance
            )[visible[:, i]].all()
            for i in range(n)
        ):
            return table
    return None


def _bias_by_key(added: Array, visible: Array) -> Array | None:
    """The bias of each key's position, float32 (heads, n); None where more than these counts.

    Every position sees itself.
    """
    bias = np.where(visible, added, 0)
    table = np.einsum("hii->hi", bias)
    same = (np.abs(bias - table[:, None]) <= _tolerance(bias))[visible].all()
    return np.ascontiguousarray(table, np.float32) if same else None


def _tolerance(bias: Array) -> float:
    return _ROUNDING * max(float(np.abs(bias).max()), 1e-3)
