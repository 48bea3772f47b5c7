"""A model whose KV cache keeps fewer features of each head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.ir.model import CanonicalModel
from slmtvm.low_rank.allocate import allocated
from slmtvm.low_rank.bases import Moments
from slmtvm.low_rank.report import RankReport, report, some, squares
from slmtvm.low_rank.seen import Seen, SeenLayer, Tokens
from slmtvm.passes.low_rank import LayerBases, LowRank

_RANK = "rank:"
_HELD = 4  # of so many windows one is kept to measure on
_SHOWN = 4  # windows by which layers are compared


def parse_kv(kv: str | None) -> tuple[str | None, int]:
    """The type of a KV cache and its rank, 0 for a whole one: "rank:32,int8" is ("int8", 32).

    What is no rank is taken as a type. Raises SlmError where a rank is no number.
    """
    if kv is None or not kv.startswith(_RANK):
        return kv, 0
    number, _, dtype = kv.removeprefix(_RANK).partition(",")
    if not number.isdecimal() or not int(number):
        raise SlmError(
            f"must be {_RANK}R or {_RANK}R,TYPE with a whole number R, such as {_RANK}32,int8; not "
            f"{kv!r}",
            where="kv",
        )
    return dtype or None, int(number)


def low_rank(
    model: CanonicalModel, rank: int, windows: Sequence[Tokens]
) -> tuple[CanonicalModel, RankReport]:
    """``model`` with a cache of ``rank`` features of each head in the mean of layers.

    ``windows`` of tokens say which: a layer whose results lose more by it than others' keeps more.

    Keys are kept as those projections, after norms and rotations, in which queries of the text see
    most of their differences; values as those that show most of attention's results in the layer
    that reads them. Raises SlmError where no head has more features, UnsupportedOpError where the
    model keeps no cache that is projected.
    """
    where = str(model.source)
    if model.kind != "decoder":
        raise UnsupportedOpError(
            f"a KV cache of lower rank for an {model.kind}; a decoder can have one: leave rank:"
            f"{rank} out of --kv",
            where=where,
        )
    sizes = [spec.head_dim for spec in model.kv]
    if not sizes or rank < 1 or rank >= max(sizes):
        heads = f"heads have {some(sizes)} features" if sizes else "there are no attentions"
        raise SlmError(
            f"a KV cache of rank {rank}: {heads}; the rank is 1 or more and less than that",
            where=where,
        )
    beyond = max(int(np.max(window)) for window in windows)
    if beyond >= model.vocab_size or min(int(np.min(window)) for window in windows) < 0:
        raise SlmError(
            f"a calibration token is not of the model's vocabulary of {model.vocab_size}: give a "
            "text with the model's own tokenizer, or ids that are",
            where=where,
        )
    seen = Seen(model)
    held = list(windows[-max(1, len(windows) // _HELD) :])
    learned = list(windows[: len(windows) - len(held)]) or held
    moments = [Moments() for _ in model.kv]
    shown: list[list[SeenLayer]] = []
    for window in learned:
        layers, _ = seen.of(window)
        for layer, (found, own) in enumerate(zip(layers, moments, strict=True)):
            own.add(seen, layer, found)
        shown += [layers] if len(shown) < _SHOWN else []

    @cache
    def bases(layer: int, left: int) -> LayerBases:
        return moments[layer].bases(left, seen.reader(layer))

    def cost(layer: int, left: int) -> float:
        call = seen.calls[layer]
        parts = [squares(la[layer], call, bases(layer, left), model)[1] for la in shown]
        wrong, right = np.sum(parts, axis=0)
        return float(wrong / max(right, np.finfo(np.float64).tiny))

    ranks = allocated(model.kv, model.num_heads, rank, cost)
    chosen = [
        None if left == spec.head_dim else bases(layer, left)
        for layer, (spec, left) in enumerate(zip(model.kv, ranks, strict=True))
    ]
    made = LowRank(chosen).apply(model)
    return made, report(model, made, seen, chosen, held, rank)
