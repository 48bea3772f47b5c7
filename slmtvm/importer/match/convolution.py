"""Causal convolutions of each channel alone."""

from __future__ import annotations

import numpy as np

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.graph import Node
from slmtvm.importer.operators.convolution import padding
from slmtvm.importer.steps import Convolution, Elementwise, Param, Rows, Step


def match_trimmed_convolution(cover: Cover, node: Node, value: str) -> Step | None:
    """What ``node`` leaves of a convolution whose padding makes it longer than the sequence."""
    frame = cover.frame
    made = frame.producers.get(node.inputs[0])
    if made is None or made.op_type != "Conv":
        return None
    if frame.small.shapes[value] != frame.small.shapes[made.inputs[0]]:
        return None
    return match_convolution(cover, made, value)


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
    weight = constant.values()
    channels, per_group, taps = weight.shape
    if per_group != 1 or channels != frame.features(x):
        raise UnsupportedOpError(
            "a convolution that mixes channels, or has several results for one, is not supported",
            where=where,
        )
    if frame.small.shapes[x][2] != frame.small.length:
        raise UnsupportedOpError("it runs over something other than the sequence", where=where)
    if node.op_type == "Conv" and padding(node.attrs)[0] < taps - 1:
        raise UnsupportedOpError(
            f"a convolution of {taps} positions that begins with {padding(node.attrs)[0]} of "
            "padding reads later positions, or begins late",
            where=where,
        )
    past = node.inputs[3] if len(node.inputs) > 3 and node.op_type != "Conv" else ""
    if past and (past not in frame.small.constants or frame.small.constants[past].values().any()):
        raise UnsupportedOpError("its past must be empty", where=where)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = cover.vector(node.inputs[2], channels, 1.0, where)
    by_tap = np.ascontiguousarray(weight[:, 0].T.astype(np.float32, copy=False))
    convolved = Convolution(cover.need(x), Param(constant.name, by_tap), bias)
    if node.attrs.get("activation", "none") in ("silu", "swish"):
        inner = Rows(f"{value}#convolved")
        cover.add(inner, convolved)
        return Elementwise("nn.silu", (inner,))
    return convolved
