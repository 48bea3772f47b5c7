"""What distinguishes one linear layer's kernel from another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slmtvm.errors import TargetError
from slmtvm.schedules.isa import PAIRS, WINDOWS

ROW_ALIGNMENT = 16
"""Activations quantized by row are padded to a multiple of this many values."""

MAX_ROW_K = 32768
"""Sums of this many products of bytes fit int32 (255 * 255 * 32768 < 2**31)."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""With at most 256 values, a group's integer sum is exact in float32."""

PAIR_UNIT = 32
"""Groups of sparse int4 weights are multiples of this many values."""

MAX_TURNED_GROUP = 64
"""Sums of so many int4 weights, half of them 0, times -127..127 fit int16: see ``turned_pairs``."""

IN_LISTS = "rows"
"""The ``window`` of int8 weights on whole rows that are listed, see ``listed_blocks``."""

FREE = "free"
"""The same where single weights are listed, see ``listed_weights``."""

COLUMNS = "columns"
"""The ``window`` of int8 weights on whole rows that are stored by columns, see ``columns``."""

LOAD_BYTES = 4
"""What one load of packed weights takes of each channel, at most."""

MIN_GROUP_CHANNELS = 4
"""Blocks of output channels are powers of two from here on: parts of vectors, or whole ones."""

BYTE_INTEGERS = ("int2", "int4", "int8")
"""Weights that exact dot products with 8-bit activations take."""

INTEGERS = (*BYTE_INTEGERS, "int16")

FLOAT8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
"""8-bit floats: bits of the exponent and the mantissa, then what ONNX appends to their names."""

SUPPORTED = {
    ("f32", "f32"): "float32 weights and activations",
    ("f16", "f32"): "float16 weights, float32 activations",
    ("bf16", "f32"): "bfloat16 weights, float32 activations",
    **{(name, "f32"): f"float8 {name} weights, float32 activations" for name in FLOAT8},
    ("int2", "f32"): "int2 weights, float32 activations",
    ("int4", "f32"): "int4 weights, float32 activations",
    ("int8", "f32"): "int8 weights, float32 activations",
    ("int16", "f32"): "int16 weights, float32 activations",
    ("int2", "block"): "int2 weights in groups, int8 activations in the same groups",
    ("int4", "block"): "int4 weights in groups, int8 activations in the same groups",
    ("int8", "block"): "int8 weights in groups, int8 activations in the same groups",
    ("int8", "row_u8"): "int8 weights by channel, uint8 activations by row",
}


@dataclass(frozen=True)
class LinearShape:
    """``y[m, n] = x[m, k] @ W[n, k].T (+ bias[n]) (+ residual[m, n])`` in one format.

    ``format``, ``activation``, ``group_size`` and ``group_channels`` are those of ``slm.linear``;
    ``scale_dtype`` is how the packed scales of a grouped format are stored ("float16" or
    "float32", see ``pick_scale_dtype``); ``float_zero_points`` are float32 ones instead of bytes.
    ``sparse``: of the weights only blocks that hold any but zeros are stored, see ``blocks``; or,
    where ``window`` names one of ``isa.WINDOWS``, only so many of each, see ``windows``. In
    groups these are PAIRS of int4 weights, see ``pairs``. float32 ones, see ``rows_in_lanes``;
    int8 ones where ``window`` is IN_LISTS, see ``listed_blocks``, FREE, see ``listed_weights``, or
    COLUMNS, see ``columns``. ``turned``: blocks of sparse weights meet activations as
    ``turned_rows`` has them, columns as ``columns.turning`` does, pairs as ``turned_pairs`` does.
    ``padded``: rows from the step's ``valid`` on are padding; tiles of nothing else become 0.
    Raises TargetError where no kernel supports the combination.
    """

    m: int
    n: int
    k: int
    format: str
    activation: str = "f32"
    group_size: int = 0
    has_zero_points: bool = False
    has_bias: bool = False
    has_residual: bool = False
    scale_dtype: str = "float32"
    float_zero_points: bool = False
    group_channels: int = 0
    sparse: bool = False
    window: str = ""
    turned: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        if (self.format, self.activation) not in SUPPORTED:
            raise self._unsupported("pairs of format and activation: " + _listed(SUPPORTED))
        if min(self.m, self.n, self.k) < 1:
            raise self._unsupported("m, n and k of at least 1")
        if self.activation == "block" and self.group_size not in GROUP_SIZES:
            raise self._unsupported(f"group sizes {', '.join(map(str, GROUP_SIZES))}")
        if self.group_size and not (self.activation == "block" or self.weight_only):
            raise self._unsupported("groups only of quantized weights, and not for whole rows")
        if self.activation == "row_u8" and self.k > MAX_ROW_K:
            raise self._unsupported(f"k up to {MAX_ROW_K} for whole rows")
        if self.has_zero_points and self.format not in INTEGERS:
            raise self._unsupported("zero points only of integer weights")
        if self.float_zero_points and (self.activation == "row_u8" or not self.has_zero_points):
            raise self._unsupported("float zero points, where there are any, but for whole rows")
        if self.group_channels:
            self._check_blocks_of_channels()
        in_pairs = (self.format, self.activation) == ("int4", "block") and self.window == PAIRS.name
        in_pairs = in_pairs and self.group_size % PAIR_UNIT == 0
        if self.sparse and not (self.activation == "row_u8" or in_pairs or self.in_lists):
            raise self._unsupported(
                "sparse weights of int8 for whole rows, of float32, and "
                f"{PAIRS.name} of int4 in groups of {PAIR_UNIT} and more"
            )
        by_name = (*WINDOWS, PAIRS.name, IN_LISTS, FREE, COLUMNS)
        in_rows = self.activation == "row_u8" and self.window in by_name
        if self.window and not (self.sparse and (in_pairs or in_rows)):
            listed = ", ".join((*WINDOWS, IN_LISTS, FREE, COLUMNS))
            raise self._unsupported(f"windows {listed} of sparse weights")
        if self.window and self.has_zero_points:
            raise self._unsupported("windows of weights without zero points")
        in_blocks = self.sparse and self.activation == "row_u8" and self.window in ("", COLUMNS)
        turned_pairs = self.window == PAIRS.name and 0 < self.group_size <= MAX_TURNED_GROUP
        if self.turned and not (in_blocks or turned_pairs):
            raise self._unsupported(
                "turned activations of blocks of sparse int8 weights, and of int4 ones in groups "
                f"up to {MAX_TURNED_GROUP}"
            )
        if self.scale_dtype not in ("float16", "float32"):
            raise self._unsupported("scale_dtype float16 or float32")

    def _check_blocks_of_channels(self) -> None:
        size = self.group_channels
        if not self.weight_only or self.group_size:
            raise self._unsupported("blocks of channels for integer and float8 weights on floats")
        if size < MIN_GROUP_CHANNELS or size & (size - 1) or self.float_zero_points:
            raise self._unsupported(
                f"blocks of 2**i channels from {MIN_GROUP_CHANNELS} on, with integer zero points"
            )

    @property
    def in_lists(self) -> bool:
        """Whether what is not zero is listed for rows in lanes: float weights, see
        ``rows_in_lanes``, or int8 ones, see ``listed_blocks`` and ``listed_weights``."""
        floats = self.format == "f32" and not self.window
        return self.sparse and (floats or self.window in (IN_LISTS, FREE))

    @property
    def in_row_pairs(self) -> bool:
        """Whether two of four int8 weights are kept, see ``row_pairs``."""
        return self.window == PAIRS.name and not self.group_size

    @property
    def in_turned_pairs(self) -> bool:
        """Whether two of four int4 weights meet pairs of activations, see ``turned_pairs``."""
        return self.turned and self.window == PAIRS.name

    @property
    def weight_only(self) -> bool:
        """Whether weights with scales meet float32 activations."""
        return self.activation == "f32" and self.format in (*INTEGERS, *FLOAT8)

    @property
    def groups(self) -> int:
        """Groups of a row; the last may be padded."""
        return -(-self.k // self.group_size) if self.group_size else 1

    @property
    def stored_group(self) -> int:
        """Values that a group takes in a channel of packed weights, see the function."""
        return stored_group(self.group_size, self.bits)

    @property
    def padded_k(self) -> int:
        """Length of a row of quantized activations and of a channel of packed weights."""
        if self.activation == "f32" and not self.weight_only:
            return self.k
        if self.group_size:
            return self.groups * self.stored_group
        return -(-self.k // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return bits_of(self.format)

    @property
    def stored_dtype(self) -> str:
        """The dtype of a packed quantized weight, and of zero points that are integers."""
        return self.format if self.format in ("int8", "int16") else "uint8"

    @property
    def stored_k(self) -> int:
        """How many of ``stored_dtype`` hold a channel of a packed quantized weight."""
        return self.padded_k * min(self.bits, 8) // 8

    @property
    def default_zero(self) -> int:
        """The zero point of weights that have none of their own."""
        return 1 << (self.bits - 1) if self.format in ("int2", "int4") else 0

    def kernel_name(self, isa: str, knobs: dict[str, int]) -> str:
        """A name that says all that the kernel's code depends on."""
        parts = ["linear", self.format, self.activation, isa, f"m{self.m}_n{self.n}_k{self.k}"]
        if self.group_channels:
            parts.append(f"c{self.group_channels}")
        if self.group_size:
            parts += [f"g{self.group_size}", f"s{self.scale_dtype[5:]}"]
        parts += [self.window or (IN_LISTS if self.in_lists else "blocks")] * self.sparse
        parts += ["turned"] * self.turned
        parts += ["zpf" if self.float_zero_points else "zp"] * self.has_zero_points + [
            "bias"
        ] * self.has_bias
        parts += ["res"] * self.has_residual + ["valid"] * self.padded
        return "_".join(parts + [f"{name}{value}" for name, value in sorted(knobs.items())])

    def _unsupported(self, supported: str) -> TargetError:
        return TargetError(f"supported are {supported}", where=f"linear layer {self}")


def bits_of(format: str) -> int:
    """Bits of one weight."""
    if format in INTEGERS:
        return int(format.removeprefix("int"))
    return {"f32": 32, "f16": 16, "bf16": 16}.get(format, 8)


def stored_group(size: int, bits: int) -> int:
    """Values of so many ``bits`` that a group takes in packed weights: it begins with a load."""
    load = LOAD_BYTES * 8 // bits if bits <= 8 else 1
    return -(-size // load) * load


def pick_scale_dtype(scales: np.ndarray) -> str:
    """ "float16" where that holds every scale exactly, else "float32"."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    return "float16" if bool((halves.astype(scales.dtype) == scales).all()) else "float32"


def _listed(pairs: dict[tuple[str, str], str]) -> str:
    return ", ".join(f"{weights}/{activation}" for weights, activation in pairs)
