"""How many layers stay dense for the perplexity to keep within a budget: those that cost most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slmtvm.errors import SlmError
from slmtvm.quantize.accuracy import Accuracy

Measure = Callable[[frozenset[str]], Accuracy]
"""What pruning all weights but these costs."""


def fewest_dense(
    weights: Sequence[str], measure: Measure, budget: float
) -> tuple[frozenset[str], Accuracy]:
    """The fewest of ``weights``, which come in the order in which they are left dense, without
    which the perplexity is at most ``budget`` times that of before; and what the others cost.

    It is looked for as if more dense weights never cost more, which measures a few of the numbers
    there are. Raises SlmError where not even pruning the last one alone keeps within the budget,
    or where there is no perplexity.
    """

    def ratio(found: Accuracy) -> float:
        if found.ppl_before is None or found.ppl_after is None:
            raise SlmError(
                "a budget is of perplexity, and this file makes no logits of the tokens that "
                "follow; use --keep-dense"
            )
        return found.ppl_after / found.ppl_before

    low, high = 0, len(weights)  # of those left dense: what may do, what does (nothing is pruned)
    best: tuple[frozenset[str], Accuracy] | None = None
    closest = float("inf")
    while low < high:
        count = (low + high) // 2
        dense = frozenset(weights[:count])
        found = measure(dense)
        closest = min(closest, ratio(found))
        if ratio(found) <= budget:
            high, best = count, (dense, found)
        else:
            low = count + 1
    if best is None:
        raise SlmError(
            f"pruning any layer makes the perplexity more than {budget:g} times that of before "
            f"({closest:.3f} times at best); a larger --budget, or fewer zeros by --sparsity"
        )
    return best
