"""Causal convolutions of each channel alone."""

from __future__ import annotations

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.graph import Array, Node
from slmtvm.importer.operators.convolution import padding
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.linear.integers import int8_convolution
from slmtvm.importer.recognise.linear.linear import match_linear
from slmtvm.importer.recognise.rounding.dynamic_rounding import rounded_rows
from slmtvm.importer.recognise.rounding.rounding import rounding_of
from slmtvm.importer.recognise.steps import (
    Convolution,
    Elementwise,
    Param,
    QuantizeDequantize,
    Step,
)


def match_trimmed_convolution(cover: Cover, node: Node, value: str) -> Step | None:
    """What ``node`` leaves of a convolution whose padding makes it longer than the sequence.

    A rounding before that is one of what is left.
    """
    frame = cover.frame
    made = _maker(frame, node.inputs[0])
    rounding = None
    if made is not None and made.op_type == "DequantizeLinear":
        quantizer = _maker(frame, made.inputs[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return None
        rounding = rounding_of(cover, quantizer)
        if rounding_of(cover, made) != rounding:
            return None
        made = _maker(frame, quantizer.inputs[0])
    if made is None or made.op_type not in ("Conv", "Mul"):
        return None
    if made.op_type == "Mul":
        convolved = match_int8_convolution(cover, made.outputs[0], value)
    elif frame.small.shapes[value] == frame.small.shapes[made.inputs[0]]:
        convolved = match_convolution(cover, made, value)
    else:
        return None
    if rounding is None or convolved is None:
        return convolved
    inner = cover.add(f"{value}#unrounded", convolved)
    return QuantizeDequantize(inner, rounding.scale, rounding.low, rounding.high)


def _maker(frame: Frame, value: str) -> Node | None:
    """What computes ``value``, not only names it."""
    node = frame.producers.get(value)
    while node is not None and node.op_type == "Identity":
        node = frame.producers.get(node.inputs[0])
    return node


def match_int8_convolution(cover: Cover, made: str, value: str) -> Step | None:
    """``made``, a convolution of integers times both scales, of which ``value`` is as long as the
    sequence.

    As of a product of integers, each row is quantized on its own.
    """
    found = int8_convolution(cover, made)
    if found is None or cover.frame.small.shapes[value] != cover.frame.small.shapes[found.x]:
        return None
    weight = _causal_weight(cover, found.node, found.x, found.weight.array)
    width = cover.frame.features(found.x)
    what = "activations of dynamically quantized convolutions"
    x = rounded_rows(cover, cover.need(found.x), width, what)
    return Convolution(x, Param(found.weight.name, weight), None)


def match_convolution(cover: Cover, node: Node, value: str) -> Step:
    """A convolution of which a row reads its own token and those before it alone.

    ``value`` is its result, or that part of it which is as long as the sequence.

    Raises UnsupportedOpError for one that mixes channels or starts with anything but zeros.
    """
    frame = cover.frame
    where = frame.graph.where(node)
    x, constant = node.inputs[0], frame.small.constants.get(node.inputs[1])
    if constant is None or value in node.outputs[1:]:
        raise UnsupportedOpError("its weight must be a constant", where=where)
    linear = match_linear(cover, node)
    if linear is not None:
        return linear
    if node.op_type == "ConvInteger":
        raise UnsupportedOpError("a convolution of integers without their scales", where=where)
    by_tap = _causal_weight(cover, node, x, constant.values())
    channels = by_tap.shape[1]
    past = node.inputs[3] if len(node.inputs) > 3 and node.op_type != "Conv" else ""
    if past and (past not in frame.small.constants or frame.small.constants[past].values().any()):
        raise UnsupportedOpError("its past must be empty", where=where)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = cover.vector(node.inputs[2], channels, 1.0, where)
    convolved = Convolution(cover.need(x), Param(constant.name, by_tap), bias)
    if node.attrs.get("activation", "none") in ("silu", "swish"):
        inner = cover.add(f"{value}#convolved", convolved)
        return Elementwise("nn.silu", (inner,))
    return convolved


def _causal_weight(cover: Cover, node: Node, x: str, weight: Array) -> Array:
    """The weight (channels, 1, taps) of a convolution of ``x`` as float32 (taps, channels).

    Raises UnsupportedOpError where a row would read more than its own channel up to its token.
    """
    frame = cover.frame
    where = frame.graph.where(node)
    channels, per_group, taps = weight.shape
    if per_group != 1 or channels != frame.features(x):
        raise UnsupportedOpError(
            "a convolution that mixes channels, or has several results for one, is not supported",
            where=where,
        )
    if frame.small.shapes[x][2] != frame.small.length:
        raise UnsupportedOpError("it runs over something other than the sequence", where=where)
    if node.op_type != "CausalConvWithState" and padding(node.attrs)[0] < taps - 1:
        raise UnsupportedOpError(
            f"a convolution of {taps} positions that begins with {padding(node.attrs)[0]} of "
            "padding reads later positions, or begins late",
            where=where,
        )
    return np.ascontiguousarray(weight[:, 0].T.astype(np.float32, copy=False))
