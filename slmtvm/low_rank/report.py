"""What a cache of lower rank costs, on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import attention, evaluate_function
from slmtvm.low_rank.seen import Floats, Seen, SeenLayer, Tokens
from slmtvm.passes.low_rank import LayerBases

_MOST_LOSS = 700.0  # nats: the perplexity is a number yet

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerError:
    """What a layer lost: the relative error (root of the mean square over that of what is right) of
    the scores before the softmax, each row's without its mean, and of the attention's results."""

    layer: int
    rank: int  # features of a head that it keeps
    whole: int  # and those it had
    scores: float
    results: float


@dataclass(frozen=True)
class RankReport:
    """What heads of ``rank`` features in the mean cost.

    ``tokens``: of the calibration text, so many that they were not learned from, where there was
    more than one window. ``layers``: those that keep fewer features. ``ppl``: the perplexity, and
    that of ``ppl_whole`` heads, where the model's first output are logits. ``kept``: the part of
    the features that the cache still has.
    """

    rank: int
    tokens: int
    kept: float
    layers: tuple[LayerError, ...]
    ppl_whole: float | None = None
    ppl: float | None = None

    def lines(self) -> list[str]:
        """For people."""
        worst = max(self.layers, key=lambda la: la.results)
        mean = float(np.mean([la.results for la in self.layers]))
        perplexity = ""
        if self.ppl_whole is not None and self.ppl is not None:
            perplexity = f"perplexity {self.ppl_whole:.5g} before and {self.ppl:.5g} after, "
        return [
            f"KV cache of rank {self.rank} (of {some([la.whole for la in self.layers])}), "
            f"{self.kept:.0%} of its numbers: on {self.tokens} calibration tokens {perplexity}"
            f"attention's results are off by {mean:.1%} in the mean of layers, "
            f"{worst.results:.1%} in layer {worst.layer}",
            *(
                f"layer {la.layer}: rank {la.rank}, scores off by {la.scores:.1%}, "
                f"results by {la.results:.1%}"
                for la in self.layers
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        digits = 4
        return {
            "rank": self.rank,
            "tokens": self.tokens,
            "kept": round(self.kept, digits),
            **(
                {"ppl_whole": round(self.ppl_whole, digits), "ppl": round(self.ppl, digits)}
                if self.ppl_whole is not None and self.ppl is not None
                else {}
            ),
            "layers": [
                {
                    **asdict(la),
                    "scores": round(la.scores, digits),
                    "results": round(la.results, digits),
                }
                for la in self.layers
            ],
        }


def report(
    model: CanonicalModel,
    made: CanonicalModel,
    seen: Seen,
    bases: Sequence[LayerBases | None],
    windows: Sequence[Tokens],
    rank: int,
) -> RankReport:
    """What ``made``, which is ``model`` with ``bases``, loses on ``windows``."""
    losses: list[list[float]] = [[], []]
    sums = np.zeros((len(bases), 2, 2))
    for window in windows:
        layers, logits = seen.of(window)
        after = evaluate_function(made, "main", np.asarray(window, np.int32))
        if logits.shape[1] == model.vocab_size:
            for rows, found in zip((logits, after), losses, strict=True):
                found.append(_loss(rows, window))
        for layer, (own, call, basis) in enumerate(zip(layers, seen.calls, bases, strict=True)):
            if basis is not None:
                sums[layer] += squares(own, call, basis, model)
    tokens = sum(len(w) - 1 for w in windows)
    errors = [
        LayerError(layer, basis.rank, spec.head_dim, *map(float, _root_ratio(found)))
        for layer, (spec, basis, found) in enumerate(zip(model.kv, bases, sums, strict=True))
        if basis is not None
    ]
    before, afterwards = (
        float(np.exp(min(sum(found) / tokens, _MOST_LOSS))) if found else None for found in losses
    )
    sizes = [spec.num_kv_heads * spec.head_dim for spec in model.kv]
    left = [spec.num_kv_heads * spec.head_dim for spec in made.kv]
    return RankReport(rank, tokens, sum(left) / sum(sizes), tuple(errors), before, afterwards)


def _root_ratio(squares: Array) -> Array:
    """Of each pair of sums of squares the root of the first over the second, 0 for no difference
    from nothing."""
    return np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], np.finfo(np.float64).tiny))


def squares(own: SeenLayer, call: relax.Call, basis: LayerBases, model: CanonicalModel) -> Array:
    """Of scores and of results, (2, 2): the squares of what is wrong, and of what is right."""
    m, heads, d = own.q.shape
    group = heads // own.k.shape[1]
    q, k, v = own.q, own.k, own.v
    by_query = np.repeat(basis.queries, group, axis=0).astype(np.float32)
    made_q = np.einsum("mhd,hdr->mhr", q, by_query, optimize=True)
    made_k, made_v = (
        np.einsum("mgd,gdr->mgr", x, b.astype(np.float32), optimize=True)
        for x, b in ((k, basis.keys), (v, basis.values))
    )
    whole, made = (
        np.einsum("mgad,ngd->gamn", x.reshape(m, -1, group, x.shape[2]), y, optimize=True)
        for x, y in ((q, k), (made_q, made_k))
    )
    found = []
    seen_by = np.tri(m)
    for x in (made - whole, whole):
        centred = x - (x * seen_by).sum(-1, keepdims=True) / seen_by.sum(-1, keepdims=True)
        found.append(float((np.square(centred) * seen_by).sum()))
    attrs = {key: call.attrs[key] for key in call.attrs.keys()}  # noqa: SIM118 (not a dict)
    extra = [model.params[e.name] for e in call.args[3:]]
    attended = attention.attention(
        {**attrs, "head_dim": basis.rank},
        *(x.reshape(m, -1) for x in (made_q, made_k, made_v)),
        *extra,
    ).reshape(m, heads, -1)
    back = np.einsum("mhr,hrd->mhd", attended, basis.results.astype(np.float32), optimize=True)
    wrong = back + basis.offset.reshape(heads, d) - own.o
    return np.array([found, [float(np.square(x).sum()) for x in (wrong, own.o)]])


def _loss(logits: Floats, tokens: Tokens) -> float:
    """The sum of the negative log likelihoods of the tokens after the first, nats."""
    rows = logits[: len(tokens) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    right = rows[np.arange(len(rows)), np.asarray(tokens[1:])]
    return float((np.log(np.exp(rows).sum(axis=1)) - right).sum())


def some(values: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))
