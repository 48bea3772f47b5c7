"""Activations that onnxruntime's optimizer fuses, some with the bias before them."""

from __future__ import annotations

from collections.abc import Sequence

from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site
from slmtvm.importer.operators.registry import FLOAT

_QUICK_GELU_ALPHA = 1.702


@expansion("BiasGelu", 1, MICROSOFT, arity=(2, 2))
def bias_gelu(site: Site) -> Sequence[str]:
    return [site.op("Gelu", site.op("Add", site.input(0), site.input(1)))]


@expansion("FastGelu", 1, MICROSOFT, arity=(1, 2))
def fast_gelu(site: Site) -> Sequence[str]:
    x = site.input(0)
    if site.input(1):
        x = site.op("Add", x, site.input(1))
    return [site.op("Gelu", x, approximate="tanh")]


@expansion("QuickGelu", 1, MICROSOFT, attributes={"alpha": (FLOAT, False)})
def quick_gelu(site: Site) -> Sequence[str]:
    """x * sigmoid(alpha * x); with alpha 1 that is SiLU."""
    x, alpha = site.input(0), site.attrs.get("alpha", _QUICK_GELU_ALPHA)
    inner = x if alpha == 1 else site.op("Mul", x, site.constant(alpha))
    return [site.op("Mul", x, site.op("Sigmoid", inner))]
