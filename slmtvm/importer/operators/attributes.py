"""What attributes may be: the one place where the values that a file gives are checked.

An attribute means the same in every operator that has it, but for those named with their operator.
What also depends on shapes (an axis, a number of heads) is checked where these are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto


@dataclass(frozen=True)
class Range:
    """The values that an attribute may have: those that ``holds`` is true of, which ``needed``
    says in words."""

    holds: Callable[[Any], bool]
    needed: str


def _among(*values: object) -> Range:
    *first, last = (repr(v) for v in values)
    return Range(lambda value: value in values, f"{', '.join(first)} or {last}")


def _from(least: int) -> Range:
    return Range(lambda value: value >= least, f"an integer from {least} on")


def _each_from(least: int) -> Range:
    return Range(lambda values: all(v >= least for v in values), f"integers from {least} on")


_ANY = Range(lambda _: True, "")
_FLAG = _among(0, 1)
_FINITE = Range(math.isfinite, "a finite number")
_NUMBER = Range(lambda value: not math.isnan(value), "a number")
_NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "a finite number from 0 on")
_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_TYPE = Range(lambda value: value in _TYPES, "a tensor's element type")
_TYPE_OR_NONE = Range(lambda value: not value or value in _TYPES, "0 or a tensor's element type")

_RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "allowzero", "causal", "channels_last", "do_rotary", "exclusive", "fmod",
            "interleaved", "is_causal", "is_packed_batching", "keepdims", "largest",
            "noop_with_empty_axes", "normalize_routing_weights", "past_present_share_buffer",
            "detect_negative", "detect_positive", "reverse", "rotary_interleaved", "saturate",
            "select_last_index", "sorted", "training_mode", "transA", "transB", "transBatchA",
            "transBatchB", "unidirectional", "upper", "use_sparse_mixer",
        ),
        _FLAG,
    ),
    **dict.fromkeys(
        (
            "K", "N", "bits", "dilation", "expert_weight_bits", "fc1_expert_weight_bits",
            "fc2_expert_weight_bits", "fc3_expert_weight_bits", "group", "k", "kv_num_heads",
            "ndim", "num_heads", "num_outputs", "opset", "q_num_heads", "sparse_block_size",
        ),
        _from(1),
    ),
    **dict.fromkeys(
        (
            "accuracy_level", "batch_dims", "block_size", "kv_cache_bit_width", "output_qk",
            "qk_matmul_output_mode", "qk_output", "rotary_embedding_dim", "sliding_window_cache",
            "state_window", "swiglu_fusion",
        ),
        _from(0),
    ),
    **dict.fromkeys(("dilations", "kernel_shape", "qkv_hidden_sizes", "strides"), _each_from(1)),
    **dict.fromkeys(("pads", "split"), _each_from(0)),
    **dict.fromkeys(
        (
            "activation_alpha", "activation_beta", "activation_gamma", "alpha", "beta", "scale",
        ),
        _FINITE,
    ),
    **dict.fromkeys(("epsilon", "qk_norm_epsilon", "softcap"), _NOT_NEGATIVE),
    **dict.fromkeys(("mask_filter_value", "max", "min", "swiglu_limit"), _NUMBER),
    **dict.fromkeys(("output_dtype", "softmax_precision"), _TYPE_OR_NONE),
    **dict.fromkeys(("dtype", "stash_type", "to"), _TYPE),
    "approximate": _among("none", "tanh"),
    "auto_pad": _among("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"),
    **dict.fromkeys(("left_window_size", "local_window_size", "right_window_size"), _from(-1)),
    "mask_index_type": _FLAG,
    "p": _among(1, 2),
    "reduction": _among("none", "add", "mul", "max", "min"),
    "round_mode": _among("up", "down", "nearest"),
    "smooth_softmax": _among(-1, 0, 1),
    # Whatever their operators do not know is refused there, or they change nothing here.
    **dict.fromkeys(
        (
            "activation", "activation_type", "equation", "k_quant_type", "mode",
            "precision", "quant_type", "ratio",
            "seed", "v_quant_type", "weights_prepacked",
        ),
        _ANY,
    ),
    # Axes and places are checked against the shape that they are of.
    **dict.fromkeys(
        (
            "axes", "axis", "end", "ends", "gather_axis", "perm", "quantize_axis", "start",
            "starts",
        ),
        _ANY,
    ),
    # Values and graphs.
    **dict.fromkeys(
        (
            "else_branch", "sparse_value", "then_branch", "value", "value_float", "value_floats",
            "value_int", "value_ints", "value_string", "value_strings",
        ),
        _ANY,
    ),
}  # fmt: skip

_OF_OPERATOR: dict[tuple[str, str], Range] = {
    ("CausalConvWithState", "activation"): _among("none", "silu", "swish"),
    ("EyeLike", "k"): _ANY,  # a diagonal
    ("GatherBlockQuantized", "quantize_axis"): _among(-2, -1, 0, 1),  # of a matrix
    ("RotaryEmbedding", "num_heads"): _from(0),  # 0: not given
}


def range_of(op_type: str, attribute: str) -> Range | None:
    """What ``attribute`` of an operator may be; None where that is not known."""
    return _OF_OPERATOR.get((op_type, attribute)) or _RANGES.get(attribute)


def fault_of(op_type: str, attribute: str, value: Any) -> str | None:
    """What is wrong with a value that a file gives an attribute; None where nothing is.

    value: an int, float or string, or a list of ints; anything else is of no range.
    """
    value = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
    allowed = range_of(op_type, attribute)
    if allowed is None or allowed.holds(value):
        return None
    return f"attribute {attribute!r} is {value!r}, where {allowed.needed} is needed"
