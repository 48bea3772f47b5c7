"""Early exits of a decoder: where tokens may end, and from which margin on they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from slmtvm.errors import SlmError
from slmtvm.ir.model import CanonicalModel, Exit
from slmtvm.ir.reference import evaluate_function
from slmtvm.passes.exits import HEAD, STEM, with_exits

AGREEMENT = 0.99
"""The part of tokens that end at an exit, of those it was chosen by, that all layers would have
followed by the same most likely one."""

_MARGIN_STEP = 64  # margins are multiples of 1/64: what decides is no last bit of a calibration
_LEAST_ENDING = 8  # tokens that must end at an exit for it to be worth its head

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChosenExit:
    """What the calibration tokens say of an exit: the part of those that reach it which end there,
    and of these the part whose most likely next token is that of all layers."""

    exit: Exit
    ending: float
    agreement: float

    def __str__(self) -> str:
        where = f"after layer {self.exit.layer}"
        return (
            f"exit {where}: from a margin of {self.exit.margin:g} on, {self.ending:.0%} of the "
            f"calibration tokens that reach it, {self.agreement:.1%} of them as all layers say"
        )


def parse_exits(wanted: Sequence[str]) -> list[Exit]:
    """Exits as ``--exit`` names them: a number of layers, or an output of the file."""
    return [Exit(int(name)) if name.isdecimal() else Exit(0, name) for name in wanted]


def choose_exits(
    model: CanonicalModel,
    wanted: Sequence[str],
    windows: Sequence[npt.NDArray[np.integer]],
    agreement: float = AGREEMENT,
) -> tuple[CanonicalModel, list[ChosenExit], list[str]]:
    """``model`` with those of the ``wanted`` exits that are sure of some tokens of ``windows``;
    what was chosen, and a sentence for each that was not.

    A token ends at the first exit whose first logit is so far ahead of the second that, of the
    calibration tokens which that holds for, the part ``agreement`` has the same most likely next
    token after all layers. Raises SlmError where no exit comes to that.
    """
    if not 0 < agreement <= 1:
        raise SlmError(f"must be above 0 and at most 1, not {agreement:g}", where="exit_agreement")
    exits = sorted_exits(model, parse_exits(wanted))
    tried = with_exits(model, exits)
    seen = list(_evaluated(tried, windows))
    final = np.concatenate([rows[-1].argmax(axis=1) for rows in seen])
    left = np.ones(len(final), bool)
    chosen: list[ChosenExit] = []
    notes: list[str] = []
    for index, exit_ in enumerate(tried.exits):
        logits = np.concatenate([rows[index] for rows in seen])
        lead, same = leads(logits), logits.argmax(axis=1) == final
        margin = _margin(lead[left], same[left], agreement)
        if margin is None:
            notes.append(
                f"no exit after layer {exit_.layer}: on the calibration tokens it comes to "
                f"{agreement:.1%} of the choices of all layers at no margin"
            )
            continue
        ends = left & (lead >= margin)
        chosen.append(
            ChosenExit(
                replace(exits[index], layer=exit_.layer, margin=margin),
                float(ends.sum() / left.sum()),
                float(same[ends].mean()),
            )
        )
        left &= ~ends
    if not chosen:
        raise SlmError("; ".join(notes), where=str(model.source))
    return with_exits(model, [c.exit for c in chosen]), chosen, notes


def sorted_exits(model: CanonicalModel, exits: Sequence[Exit]) -> list[Exit]:
    """The exits from the first layer on; raises SlmError where two are after the same."""
    placed = with_exits(model, exits).exits
    layers = [exit_.layer for exit_ in placed]
    if len(set(layers)) < len(layers):
        raise SlmError(f"two exits after one layer: {layers}", where=str(model.source))
    order = np.argsort(layers)
    return [exits[i] for i in order]


def leads(logits: Array) -> Array:
    """How far the largest of each row (n, vocab) is ahead of the next, (n,)."""
    top = np.partition(logits, -2, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0], np.float32)


def _evaluated(
    model: CanonicalModel, windows: Sequence[npt.NDArray[np.integer]]
) -> Iterator[list[Array]]:
    """Of each window the logits at each exit, and those after all layers."""
    for tokens in windows:
        rows, found = np.asarray(tokens, np.int32), []
        for index in range(len(model.exits)):
            rows = evaluate_function(model, f"{STEM}{index}", rows)
            found.append(evaluate_function(model, f"{HEAD}{index}", rows))
        yield [*found, evaluate_function(model, "main", np.asarray(tokens, np.int32))]


def _margin(lead: Array, same: npt.NDArray[np.bool_], agreement: float) -> float | None:
    """The least margin from which on ``agreement`` holds of the tokens ahead by it; None where none
    has enough of them."""
    order = np.argsort(-lead, kind="stable")
    counts = np.arange(1, len(order) + 1)
    good = np.cumsum(same[order]) >= agreement * counts
    for last in np.flatnonzero(good)[::-1]:
        margin = float(np.floor(lead[order[last]] * _MARGIN_STEP) / _MARGIN_STEP)
        taken = lead >= margin
        if taken.sum() < _LEAST_ENDING:
            return None
        if same[taken].mean() >= agreement:
            return margin
    return None
