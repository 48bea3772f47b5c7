"""Matrix products with a transposition, a factor or an activation fused into them."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import AttributeProto

from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site
from slmtvm.importer.operators.registry import FLOAT, INT

_STRING = int(AttributeProto.STRING)
_PLAIN_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")
_SHAPED_ACTIVATIONS = {"LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta")}

_TRANSPOSED = {"transA": (INT, False), "transB": (INT, False), "alpha": (FLOAT, False)}


@expansion("TransposeMatMul", 1, MICROSOFT, arity=(2, 2), attributes=_TRANSPOSED)
@expansion(
    "FusedMatMul", 1, MICROSOFT, arity=(2, 2),
    attributes={**_TRANSPOSED, "transBatchA": (INT, False), "transBatchB": (INT, False)},
)  # fmt: skip
def fused_matmul(site: Site) -> Sequence[str]:
    """alpha * A' @ B', the last two axes, or all but the last, swapped or rolled on the way."""
    given = site.attrs
    a, b = (
        _turned(site, site.input(i), given.get(f"transBatch{s}", 0), given.get(f"trans{s}", 0))
        for i, s in enumerate("AB")
    )
    product = site.op("MatMul", a, b)
    alpha = given.get("alpha", 1.0)
    return [product if alpha == 1 else site.op("Mul", product, site.constant(alpha))]


def _turned(site: Site, value: str, batch: int, matrix: int) -> str:
    """``value`` with its first axis moved behind the other batch axes, then its matrices turned."""
    rank = site.rank(value)
    axes = list(range(rank))
    if batch and rank > 2:
        axes = [*axes[1:-1], 0, axes[-1]]
    if matrix and rank > 1:
        axes[-2:] = axes[:-3:-1]
    return value if axes == sorted(axes) else site.op("Transpose", value, perm=tuple(axes))


@expansion(
    "FusedGemm", 1, MICROSOFT, arity=(2, 3),
    attributes={
        **_TRANSPOSED,
        "beta": (FLOAT, False),
        "activation": (_STRING, False),
        "activation_alpha": (FLOAT, False),
        "activation_beta": (FLOAT, False),
        "activation_gamma": (FLOAT, False),
    },
)  # fmt: skip
def fused_gemm(site: Site) -> Sequence[str]:
    given = ("transA", "transB", "alpha", "beta")
    attrs = {name: site.attrs[name] for name in given if name in site.attrs}
    y = site.op("Gemm", *site.node.inputs, **attrs)
    activation = site.attrs.get("activation", "")
    if activation in _PLAIN_ACTIVATIONS:
        y = site.op(activation, y)
    elif activation in _SHAPED_ACTIVATIONS:
        shape = {
            name: site.attrs[f"activation_{name}"]
            for name in _SHAPED_ACTIVATIONS[activation]
            if f"activation_{name}" in site.attrs
        }
        y = site.op(activation, y, **shape)
    elif activation:
        raise site.refuse(f"the activation {activation!r}")
    return [y]
