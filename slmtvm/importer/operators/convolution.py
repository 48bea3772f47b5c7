"""Convolutions along the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.graph import Array
from slmtvm.importer.operators.registry import INT, Attrs, Kind, Shape, register


def padding(attrs: Attrs) -> tuple[int, int]:
    """How many zeros lie before and behind the sequence."""
    if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {attrs['auto_pad']} is not supported")
    before, after = attrs.get("pads", (0, 0))
    return int(before), int(after)


def is_pointwise(attrs: Attrs, weight: Shape) -> bool:
    """Whether each place is read alone: a linear layer, along as many axes as there are."""
    plain = set(attrs.get("strides", (1,))) == {1} and not any(attrs.get("pads", (0,)))
    return plain and set(weight[2:]) == {1} and attrs.get("group", 1) == 1


def _shapes(attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    x, weight = shapes[:2]
    if len(x) == len(weight) > 2 and is_pointwise(attrs, weight):
        if x[1] != weight[1]:
            raise ValueError(f"{x[1]} channels and a weight of {list(weight)} do not fit")
        return [(x[0], weight[0], *x[2:])]
    if len(x) != 3 or len(weight) != 3:
        raise UnsupportedOpError(
            f"a convolution of {list(x)} by a weight of {list(weight)}; supported are those along "
            "one axis, the sequence, and linear layers written as one (a weight of one place, one "
            "group, no padding)"
        )
    if set(attrs.get("strides", (1,))) != {1} or set(attrs.get("dilations", (1,))) != {1}:
        raise UnsupportedOpError("convolutions with strides or dilations are not supported")
    if x[1] != weight[1] * attrs.get("group", 1) or weight[0] % attrs.get("group", 1):
        raise ValueError(f"{x[1]} channels and a weight of {list(weight)} do not fit")
    length = x[2] + sum(padding(attrs)) - weight[2] + 1
    if length < 1:
        raise ValueError(f"the weight of {list(weight)} is longer than the sequence")
    return [(x[0], weight[0], length)]


@register("Conv", 1, Kind.CONVOLVE, shapes=_shapes)
def conv(attrs: Attrs, x: Array, weight: Array, bias: Array | None = None) -> Any:
    (shape,) = _shapes(attrs, (x.shape, weight.shape), ())
    if is_pointwise(attrs, weight.shape):
        places = x.reshape(*x.shape[:2], -1)
        result = (weight.reshape(weight.shape[:2]) @ places).reshape(shape)
        return result if bias is None else result + bias.reshape(-1, *(1,) * (x.ndim - 2))
    groups, taps = attrs.get("group", 1), weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), padding(attrs)))
    result = np.zeros(shape, np.result_type(x, weight))
    for part, mine in enumerate(np.split(weight, groups)):
        channels = slice(part * len(mine), (part + 1) * len(mine))
        own = padded[:, part * weight.shape[1] : (part + 1) * weight.shape[1]]
        for tap in range(taps):
            result[:, channels] += mine[:, :, tap] @ own[:, :, tap : tap + shape[2]]
    return result if bias is None else result + bias[:, None]


@register(
    "ConvInteger",
    10,
    Kind.CONVOLVE,
    shapes=_shapes,
    arity=(2, 4),
    result=lambda *_: np.dtype(np.int32),
)
def conv_integer(
    attrs: Attrs,
    x: Array,
    weight: Array,
    zero: Array | None = None,
    weight_zero: Array | None = None,
) -> Any:
    wide = x.astype(np.int32) - (0 if zero is None else np.int32(zero))
    ones = (1,) * (weight.ndim - 1)
    offset = 0 if weight_zero is None else weight_zero.astype(np.int32).reshape(-1, *ones)
    return conv(attrs, wide, weight.astype(np.int32) - offset)


def _state_shapes(attrs: Attrs, shapes: Sequence[Any], _constants: Sequence[Any]) -> list[Shape]:
    x, weight = shapes[:2]
    plain = attrs.get("ndim", 1) == 1 and attrs.get("dilation", 1) == 1
    if not plain or attrs.get("channels_last", 0) or attrs.get("state_window", 0) or len(x) != 3:
        raise ValueError("only a convolution of (batch, channels, length) without dilation")
    if len(weight) != 3 or weight[:2] != (x[1], 1):
        raise ValueError(f"a weight of {list(weight)} for {x[1]} channels")
    return [x, (x[0], x[1], weight[2] - 1)]


@register(
    "CausalConvWithState",
    1,
    Kind.CONVOLVE,
    "com.microsoft",
    shapes=_state_shapes,
    arity=(2, 4),
    attributes={
        "ndim": (INT, False),
        "activation": (int(AttributeProto.STRING), False),
        "channels_last": (INT, False),
        "dilation": (INT, False),
        "state_window": (INT, False),
    },
)
def causal_conv_with_state(
    attrs: Attrs, x: Array, weight: Array, bias: Array | None = None, past: Array | None = None
) -> Any:
    state = weight.shape[2] - 1
    if past is None:
        past = np.zeros((*x.shape[:2], state), x.dtype)
    whole = np.concatenate([past.astype(x.dtype), x], axis=2)
    result = conv({"group": x.shape[1]}, whole, weight, bias)
    if attrs.get("activation", "none") in ("silu", "swish"):
        result = result / (1 + np.exp(-result))
    return result, whole[:, :, whole.shape[2] - state :]
