"""Which projections of heads lose least, by the moments of what attentions saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slmtvm.low_rank.seen import Floats, Seen, SeenLayer
from slmtvm.passes.low_rank import LayerBases

_LEAST = 1e-30  # of a mean variance: heads that are all 0 are projected to 0
_RIDGE = 1e-6  # of a mean variance: what no calibration token showed is not divided by

Array = npt.NDArray[np.float64]


@dataclass
class Moments:
    """Sums over tokens of one layer."""

    queries: Array | float = 0.0  # (kv heads, D, D): products of features
    keys: Array | float = 0.0
    key_sums: Array | float = 0.0  # (kv heads, D)
    key_count: int = 0
    results: Array | float = 0.0  # (heads, D, D)
    result_sums: Array | float = 0.0  # (heads, D)
    result_count: int = 0

    def add(self, seen: Seen, layer: int, own: SeenLayer) -> None:
        """What a window shows."""
        groups = own.k.shape[1]
        for q, k in seen.places(layer, own):
            by_group = q.reshape(len(q), groups, -1, q.shape[2])
            self.queries = self.queries + np.einsum(
                "mgad,mgae->gde", by_group, by_group, dtype=np.float64, optimize=True
            )
            self.keys = self.keys + _products(k)
            self.key_sums = self.key_sums + k.sum(axis=0, dtype=np.float64)
            self.key_count += len(k)
        self.results = self.results + _products(own.o)
        self.result_sums = self.result_sums + own.o.sum(axis=0, dtype=np.float64)
        self.result_count += len(own.o)

    def bases(self, rank: int, reader: Floats | None) -> LayerBases:
        """The best of ``rank`` features; ``reader`` as ``Seen.reader`` has it."""
        keys = _centred(self.keys, self.key_sums, self.key_count)
        queries, groups = np.asarray(self.queries) / self.key_count, len(keys)
        mean = np.asarray(self.result_sums) / self.result_count
        spread = _centred(self.results, self.result_sums, self.result_count)
        heads, d = mean.shape
        metric = np.broadcast_to(np.eye(d), (heads, d, d))
        if reader is not None:
            by_head = reader.astype(np.float64).reshape(len(reader), heads, d)
            metric = np.einsum("nhd,nhe->hde", by_head, by_head, optimize=True)
        pairs = [_best(q, k, rank) for q, k in zip(queries, keys, strict=True)]
        shared = (x.reshape(groups, -1, d, d).sum(axis=1) for x in (metric, spread))
        values = np.stack([_best(w, c, rank)[1] for w, c in zip(*shared, strict=True)])
        back = np.stack(
            [
                _restoring(c, basis)
                for c, basis in zip(spread, np.repeat(values, heads // groups, axis=0), strict=True)
            ]
        )
        projected = np.einsum("hd,hdr->hr", mean, np.repeat(values, heads // groups, axis=0))
        offset = mean - np.einsum("hr,hrd->hd", projected, back)
        return LayerBases(
            np.stack([q for q, _ in pairs]), np.stack([k for _, k in pairs]), values, back,
            offset.reshape(-1),
        )  # fmt: skip


def _products(x: Floats) -> Array:
    """Sums over tokens of products of features, (heads, D, D), of x (m, heads, D)."""
    by_head = x.transpose(1, 0, 2).astype(np.float64)
    return by_head.transpose(0, 2, 1) @ by_head


def _centred(products: Array | float, sums: Array | float, count: int) -> Array:
    """The covariance of features, (heads, D, D)."""
    mean = np.asarray(sums) / count
    return np.asarray(products) / count - mean[:, :, None] * mean[:, None, :]


def _root(moment: Array) -> Array:
    """L with L L^T = ``moment`` (D, D), and a ridge in the place of smaller variances."""
    sizes, vectors = np.linalg.eigh(moment)
    return np.asarray(vectors * np.sqrt(np.maximum(sizes, _ridge(moment))))


def _ridge(moment: Array) -> float:
    return _RIDGE * max(float(np.trace(moment)) / len(moment), _LEAST)


def _best(left: Array, right: Array, rank: int) -> tuple[Array, Array]:
    """A and B (D, rank) with the least sum of squares of x^T (1 - A B^T) y, where x and y have the
    moments ``left`` and ``right``.

    With roots L and R of these it is the squared norm of L^T (1 - A B^T) R, whose best
    approximation are the first singular vectors of L^T R. A and B share the singular values, so
    that both sides have features of equal variances.
    """
    l_root, r_root = _root(left), _root(right)
    u, s, vt = np.linalg.svd(l_root.T @ r_root)
    u, s, v = u[:, :rank], np.sqrt(s[:rank]), vt[:rank].T
    # The sign of a pair is anyone's choice.
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])
    a = np.linalg.solve(l_root.T, u * (s * sign))
    b = np.linalg.solve(r_root.T, v * (s * sign))
    return a, b


def _restoring(moment: Array, basis: Array) -> Array:
    """(rank, D): what of ``y B`` is nearest to y (D,) of this ``moment``, for the basis B."""
    seen = basis.T @ (moment + _ridge(moment) * np.eye(len(moment)))
    return np.asarray(np.linalg.solve(seen @ basis, seen))
