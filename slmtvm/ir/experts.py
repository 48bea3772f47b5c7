"""Mixture of experts: the canonical op ``slm.moe``, and the ops that a pass splits it into.

A token is routed to ``top_k`` of ``experts`` small networks of two linear layers; the results are
added up, each times the token's weight for that expert. A *pair* is a token and one of its experts:
pair ``t * top_k + j`` is token t and the j-th expert that it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from tvm import relax
from tvm.relax import Expr

from slmtvm.ir import expert_roundings
from slmtvm.ir.ops import define, make_call, name_operands, rows

SCORES = ("none", "sigmoid", "softmax")
NORMALIZATIONS = ("none", "sum", "softmax")
GATED = ("swiglu",)
ACTIVATIONS = (*GATED, "silu", "relu", "gelu_erf", "gelu_tanh", "identity")
ROW_MULTIPLE = 16  # a quantized row is padded to whole ones
_LAYERS = ("up", "down")
Attrs = Mapping[str, Any]  # of a call
_OPERANDS = ("weight", "scales", "zero_points", "bias")


_T = TypeVar("_T")


@dataclass(frozen=True)
class Routing:
    """How a token's router logits become its experts and their weights.

    Scores are the logits ("none"), their sigmoid, or their softmax over all experts. The ``top_k``
    experts with the largest score, plus a bias of each expert where one is given, are chosen, the
    lower index first where two are equal. Their scores, without the bias, are the weights:
    ``normalize`` "sum" divides them by ``eps`` plus their sum, "softmax" takes their softmax. Last
    they are multiplied by ``scale``. ``roundings`` are of values on the way, the text as
    ``expert_roundings.as_text`` makes it.
    """

    experts: int
    top_k: int
    score: str = "softmax"
    normalize: str = "none"
    eps: float = 0.0
    scale: float = 1.0
    roundings: str = ""

    @staticmethod
    def of(attrs: Attrs) -> Routing:
        """The routing that the attributes of a call say."""
        return Routing(
            int(attrs["experts"]), int(attrs["top_k"]), str(attrs["score"]),
            str(attrs["normalize"]), float(attrs["eps"]), float(attrs["scale"]),
            str(attrs["roundings"]),
        )  # fmt: skip


@dataclass(frozen=True)
class ExpertLayer:
    """One linear layer of every expert; operands and formats are those of ``slm.linear``, stacked.

    weight (experts, ...), scales and zero_points (experts, n), (experts, n, groups), or (experts,
    n / group_channels, k) where that many outputs, a part of n, share scales; bias (experts, n).
    """

    n: int
    k: int
    format: str
    activation: str = "f32"
    group_size: int = 0
    group_channels: int = 0

    @staticmethod
    def of(attrs: Attrs, prefix: str = "") -> ExpertLayer:
        """The layer that the attributes of a call say."""
        given = {f.name: attrs[f"{prefix}{f.name}"] for f in fields(ExpertLayer)}
        return ExpertLayer(
            int(given["n"]), int(given["k"]), str(given["format"]), str(given["activation"]),
            int(given["group_size"]), int(given["group_channels"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """What happens between an expert's two layers: one of ACTIVATIONS.

    "swiglu" halves its input into g and l: ``g = min(g, limit)``, ``l = clamp(l, -limit, limit)``,
    ``g * sigmoid(alpha * g) * (l + beta)``; the numbers are read for it alone.
    """

    activation: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = float("inf")

    @property
    def plain(self) -> bool:
        """Whether it is ``silu(g) * l``."""
        return self == Gate("swiglu")


def _features_n(call: relax.Call) -> relax.Type:
    return relax.TensorType((rows(call.args[0]), int(call.attrs["down_n"])), "float32")


def _route_type(call: relax.Call) -> relax.Type:
    shape = (rows(call.args[0]), int(call.attrs["top_k"]))
    return relax.TupleType([relax.TensorType(shape, t) for t in ("int32", "float32")])


def _routed_type(call: relax.Call) -> relax.Type:
    chosen = call.args[int(call.attrs["inputs"])]
    pairs = rows(chosen) * int(chosen.ty.shape[1])
    return relax.TensorType((pairs, int(call.attrs["n"])), "float32")


def _routed_row_type(call: relax.Call) -> relax.Type:
    x, chosen = call.args[:2]
    gated = str(call.attrs["activation"]) in GATED
    pairs, d = rows(chosen) * int(chosen.ty.shape[1]), int(x.ty.shape[1]) // (2 if gated else 1)
    if not int(call.attrs["quantized"]):
        return relax.TensorType((pairs, d), "float32")
    fields = [("int8", -(-d // ROW_MULTIPLE) * ROW_MULTIPLE), ("float32", 1), ("int32", 1)]
    return relax.TupleType([relax.TensorType((pairs, n), dtype) for dtype, n in fields])


def _combined_type(call: relax.Call) -> relax.Type:
    partial, weights = call.args[:2]
    return relax.TensorType((rows(weights), int(partial.ty.shape[1])), "float32")


MOE = define("slm.moe", _features_n)
ROUTE = define("slm.route", _route_type)
ROUTED_LINEAR = define("slm.routed_linear", _routed_type)
ROUTED_ROW = define("slm.routed_row", _routed_row_type)
COMBINE = define("slm.combine", _combined_type)


def moe(
    x: Expr,
    logits: Expr,
    up: Mapping[str, Expr | None],
    down: Mapping[str, Expr | None],
    *,
    routing: Routing,
    gate: Gate,
    up_layer: ExpertLayer,
    down_layer: ExpertLayer,
    selection_bias: Expr | None = None,
    roundings: Mapping[str, Expr] | None = None,
) -> relax.Call:
    """``y[t] = sum over the chosen e of weight[t, e] * down_e(gate(up_e(x[t])))``.

    x: float32 (m, up.k); logits: float32 (m, experts); selection_bias: float32 (experts,). ``up``
    and ``down`` name operands of ExpertLayer; ``up.n`` is ``down.k``, or twice it where the gate
    is one of GATED. A token reads the weights of its own experts only. -> float32 (m, down.n)

    ``roundings``: for points of ``expert_roundings``, float32 (experts, 3): scale, lowest and
    highest level of each expert. The experts are added up in order where TOTAL is among them; of
    gates those that are ``plain`` or not GATED may have them.
    """
    named: dict[str, Expr | None] = {"logits": logits, "selection_bias": selection_bias}
    named.update(expert_roundings.as_operands(roundings or {}))
    attrs: dict[str, Any] = {**asdict(routing), **{f"gate_{k}": v for k, v in asdict(gate).items()}}
    for prefix, layer, given in zip(_LAYERS, (up_layer, down_layer), (up, down), strict=True):
        named.update({f"{prefix}_{key}": value for key, value in given.items()})
        attrs.update({f"{prefix}_{key}": value for key, value in asdict(layer).items()})
    args, names = name_operands([x], named)
    return make_call(MOE, args, operands=names, **attrs)


def layer_operands(named: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """Of the operands of ``slm.moe`` those of the layer "up" or "down", by their own names."""
    return {key: named[f"{prefix}_{key}"] for key in _OPERANDS if f"{prefix}_{key}" in named}


def gate_of(attrs: Attrs) -> Gate:
    """The gate that the attributes of an ``slm.moe`` say."""
    return Gate(
        str(attrs["gate_activation"]),
        *(float(attrs[f"gate_{name}"]) for name in ("alpha", "beta", "limit")),
    )


def route(logits: Expr, bias: Expr | None, routing: Routing) -> relax.Call:
    """-> (experts int32 (m, top_k), their weights float32 (m, top_k))"""
    args, names = name_operands([logits], {"bias": bias})
    return make_call(ROUTE, args, operands=names, **asdict(routing))


def routed_linear(
    inputs: list[Expr],
    chosen: Expr,
    named: Mapping[str, Expr],
    layer: ExpertLayer,
    *,
    experts: int,
    by_pair: bool,
) -> relax.Call:
    """``slm.linear`` of each pair with the weights of its expert.

    inputs: x float32, or its quantized rows as QUANTIZED_LINEAR takes them, with a row for each
    token, or where ``by_pair`` for each pair. chosen: int32 (m, top_k). -> float32 (m * top_k, n)
    """
    args, names = name_operands([*inputs, chosen], dict(named))
    return make_call(
        ROUTED_LINEAR, args, operands=names, inputs=len(inputs), experts=experts,
        by_pair=int(by_pair), **asdict(layer),
    )  # fmt: skip


def routed_row(
    x: Expr,
    chosen: Expr,
    roundings: Mapping[str, Expr],
    *,
    activation: str,
    by_pair: bool,
    quantized: bool = False,
) -> relax.Call:
    """The gate of ``activation`` on a row for each pair, with the roundings of its expert.

    x: float32, a row for each token, or where ``by_pair`` for each pair; chosen: int32 (m, top_k).
    The last rounding is HIDDEN, or INPUT of "identity". -> float32 (m * top_k, features), or where
    ``quantized``, which that last rounding must then have 8 bits for, the tuple (q one byte each
    (m * top_k, padded), scale float32 (m * top_k, 1), zero point int32 (m * top_k, 1)).
    """
    args, names = name_operands([x, chosen], expert_roundings.as_operands(roundings))
    return make_call(
        ROUTED_ROW, args, operands=names, activation=activation, by_pair=int(by_pair),
        quantized=int(quantized),
    )  # fmt: skip


def combine(
    partial: Expr, weights: Expr, chosen: Expr | None = None,
    roundings: Mapping[str, Expr] | None = None,
) -> relax.Call:  # fmt: skip
    """``y[t] = sum_j weights[t, j] * partial[t * top_k + j]``; partial float32 (m * top_k, d).

    With ``roundings`` of the points OF_SUM, for the experts ``chosen`` int32 (m, top_k).
    """
    tables = expert_roundings.as_operands(roundings or {})
    args, names = name_operands([partial, weights], {"chosen": chosen, **tables})
    return make_call(COMBINE, args, operands=names)


def with_format(layer: ExpertLayer, activation: str) -> ExpertLayer:
    """``layer`` on rows that are held in another format."""
    return replace(layer, activation=activation)
