"""Where a statically quantized file rounds values inside a mixture of experts.

Each point is a value that every expert computes, rounded as ``slm.quantize_dequantize`` does, with
a scale and ends of each expert's own. A point that is not named is not rounded.
"""

from __future__ import annotations

INPUT = "input"  # rows before the first layer
BEFORE_GATE = ("gate", "up")  # the halves of a gated layer's product; "up" of any other product
IN_GATE = (
    "sigmoid",
    "activation",
)  # of silu(g): the sigmoid, and where another half follows silu(g)
HIDDEN = "hidden"  # what the second layer takes
OF_GATE = (*BEFORE_GATE, *IN_GATE, HIDDEN)
DOWN, WEIGHT, WEIGHTED = "down", "weight", "weighted"  # its product, the token's weight, both's
TOTAL = "total"  # a token's sum over the experts before this one, whether it chose them or not
OF_SUM = (DOWN, WEIGHT, WEIGHTED, TOTAL)
POINTS = (INPUT, *OF_GATE, *OF_SUM)

ROUTING_POINTS = ("scores", "selection", "sum", "divisor")
"""Of the routing, for all experts alike: scores, those with the bias, the sum of the chosen ones,
and that plus epsilon."""

Levels = tuple[float, int, int]
"""Scale, lowest and highest level."""
