"""Early exits: what a bundle's own layers, all of them, say of tokens that ended before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slmtvm.runtime.session import Session
from slmtvm.verify.cases import Case
from slmtvm.verify.metrics import log_softmax

_MOST_TOKENS = 512  # each is decoded twice, on its own
_TURNS = 4  # windows are decoded with exits and without in turns, so often at least


@dataclass(frozen=True)
class ExitReport:
    """Tokens decoded one by one, with exits and without.

    ``ended``: the part of the tokens that ended at each exit. ``top1``: of all tokens, the part
    that exits left with the same most likely next one; ``ppl`` and ``ppl_whole``: the perplexity
    with exits and without. ``speed``: tokens a second with exits over those without.
    """

    tokens: int
    layers: tuple[int, ...]
    ended: tuple[float, ...]
    top1: float
    ppl: float
    ppl_whole: float
    speed: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        places = ", ".join(
            f"{part:.1%} after layer {layer}"
            for layer, part in zip(self.layers, self.ended, strict=True)
        )
        return (
            f"early exits: {places}, of {self.tokens} tokens; decoding {self.speed:.2f} times as "
            f"fast, same top-1 token {self.top1:.2%}, perplexity {self.ppl:.4f} "
            f"({self.ppl_whole:.4f} by all layers)"
        )


def compare_exits(session: Session, cases: Sequence[Case]) -> ExitReport | None:
    """What the exits of a bundle cost and save on the tokens of ``cases``; None without exits.

    Leaves the session empty, with its exits in use.
    """
    exits = session.info.get("exits", [])
    if not exits:
        return None
    taken = np.zeros(len(exits) + 1, np.int64)
    same = tokens = 0
    losses, seconds = np.zeros(2), np.zeros(2)
    left = _MOST_TOKENS
    for case in cases:
        ids = np.asarray(case.tokens)[:left]
        following = np.asarray(case.following)[: len(ids)]
        if not len(ids):
            break
        rows: dict[bool, np.ndarray] = {}
        for turn in range(_TURNS):
            use = turn % 2 == 0
            found, ended, spent = _decode(session, ids, use)
            seconds[int(use)] += spent
            rows[use] = found
            if turn == 0:
                taken += np.bincount(ended, minlength=len(taken))
        same += int((rows[True].argmax(axis=1) == rows[False].argmax(axis=1)).sum())
        losses += [_loss(rows[use], following) for use in (False, True)]
        tokens, left = tokens + len(ids), left - len(ids)
    session.use_exits(True)
    session.reset()
    return ExitReport(
        tokens=tokens,
        layers=tuple(int(e["layer"]) for e in exits),
        ended=tuple(float(n) / tokens for n in taken[1:]),
        top1=same / tokens,
        ppl=float(np.exp(losses[1] / tokens)),
        ppl_whole=float(np.exp(losses[0] / tokens)),
        speed=float(seconds[0] / seconds[1]),
    )


def _loss(rows: np.ndarray, following: np.ndarray) -> float:
    """What the tokens that follow cost, in nats."""
    return -float(log_softmax(rows)[np.arange(len(rows)), following].sum())


def _decode(session: Session, ids: np.ndarray, use: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits (n, vocab) after each token, where each ended, and the seconds that it took."""
    session.reset()
    session.use_exits(use)
    rows, ended = [], []
    begin = time.perf_counter()
    for token in ids:
        rows.append(session.eval([int(token)]))
        ended.append(session.exit_taken)
    return np.stack(rows), np.array(ended), time.perf_counter() - begin
