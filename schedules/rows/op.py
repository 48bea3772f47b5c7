"""What a row kernel computes: a prologue that makes float rows, an epilogue that stores them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from slmtvm.schedules.kernel import Tensor
from slmtvm.schedules.rows.pair import Pair
from slmtvm.schedules.vector import LANES

ACTIVATIONS = ("silu", "relu", "gelu_erf", "gelu_tanh", "sigmoid", "tanh")
GLUS = tuple(f"{activation}_glu" for activation in ACTIVATIONS)
PROLOGUES = ("copy", "rms_norm", "layer_norm", "swiglu", "pair", "rescale", *ACTIVATIONS, *GLUS)
EPILOGUES = ("f32", "block", "row_u8", "range", "rounded", "static_u8")
GATED = (*GLUS, "swiglu")  # those that read rows twice as long
NORMS = ("rms_norm", "layer_norm")
STATIC = ("rounded", "static_u8")  # with a scale that is known beforehand
OTHERS = ("rows", "features", "number")


@dataclass(frozen=True)
class RowOp:
    """``epilogue(prologue(x))`` for m rows of d features; the kernel's grid is the rows.

    With ``groups`` every row of a norm without quantization has that many parts of d features, each
    normed on its own with the same gamma: shapes (m, d) below are (m, groups * d).

    Prologues, from x float32 (m, d), all element-wise but the norms:
      copy; silu; relu; gelu_erf; gelu_tanh; sigmoid; tanh;
      rms_norm: x / sqrt(mean(x**2) + eps) * gamma, gamma float32 (d,);
      layer_norm: (x - mean) / sqrt(var + eps) * gamma + beta, beta float32 (d,);
      silu_glu and so on: silu(x[:, :d]) * x[:, d:], x float32 (m, 2 d);
      swiglu: g * sigmoid(alpha * g) * (l + beta) of g = min(x[:, :d], limit) and l = x[:, d:]
        between -limit and limit; constants float32 (3,) are alpha, beta and limit;
      pair: ``pair`` of x and other, as ``other`` says "rows" float32 (m, d), "features" (d,), or
        "number" (m, 1);
      rescale: x, which counts steps float32 (d,), as multiples of ``unit``.
    With ``residual`` a norm reads x + residual (float32 (m, d)) and stores it as output ``sum``.

    Epilogues; y is the prologue's result, columns d .. k_padded hold zero:
      f32: y float32 (m, d).
      block: xq int8 (m, k_padded), xs and xsum float32 (m, k_padded / group_size): for each block
        xs = amax / 127, xq = y * (127 / amax) rounded half to even, xsum = sum of xq; a block whose
        amax is below 1e-30 counts as zero (all three are 0).
      row_u8: ONNX DynamicQuantizeLinear on each row: xs float32 (m,), xz int32 (m,) the unsigned
        zero point, xq (m, k_padded) as ``storage`` says: "uint8", or "int8" for 128 less. A row of
        zeros has xs 1 and xz 0.
      rounded: y float32 (m, d) = q * scale for q = y / scale rounded half to even, within low and
        high: what QuantizeLinear and DequantizeLinear with constants make of it.
      static_u8: that q, less low, as row_u8 has it: xs is scale and xz is -low for every row.
      range: y, and low and high float32 (m_padded,): the least and greatest of the row and 0.
    With ``keep_f32`` a quantizing epilogue stores y, too, "static_u8" the y of "rounded".

    The scales and zero points of a file's own quantization are many: the kernel does not depend on
    them, it reads ``numbers``.
    """

    prologue: str
    epilogue: str
    m: int
    d: int
    eps: float = 0.0
    group_size: int = 0
    storage: str = "uint8"
    keep_f32: bool = False
    residual: bool = False
    groups: int = 1
    k_multiple: int = LANES  # k_padded of row_u8 is a multiple of it
    scale: float = 0.0  # of "rounded" and "static_u8"
    low: int = 0
    high: int = 0
    pair: Pair | None = None
    other: str = "rows"
    unit: float = 0.0

    def __post_init__(self) -> None:
        assert self.prologue in PROLOGUES, self.prologue
        assert self.epilogue in EPILOGUES, self.epilogue
        assert self.storage in ("uint8", "int8"), self.storage
        assert self.m > 0 and self.d > 0, (self.m, self.d)
        assert (self.epilogue == "block") == (self.group_size > 0), self
        assert self.group_size % LANES == 0 and self.k_multiple % LANES == 0, self
        assert (self.epilogue in STATIC) == (self.scale > 0), self
        assert self.low <= 0 <= self.high and self.high - self.low < 1 << 16, self
        assert self.epilogue != "static_u8" or self.high - self.low < 1 << 8, self
        assert not self.residual or self.prologue in NORMS, self
        assert (self.prologue == "pair") == (self.pair is not None), self
        assert self.other in OTHERS, self.other
        assert (self.prologue == "rescale") == (self.unit > 0), self
        whole_rows = self.prologue not in NORMS or self.epilogue != "f32"
        assert self.groups == 1 or not whole_rows, self

    @property
    def k_padded(self) -> int:
        """Columns of xq."""
        multiple = self.group_size if self.epilogue == "block" else self.k_multiple
        return -(-self.d // multiple) * multiple

    @property
    def blocks(self) -> int:
        """Blocks of a row, for the epilogue "block"."""
        return self.k_padded // self.group_size

    @property
    def stores_y(self) -> bool:
        """Whether y is an output."""
        return self.epilogue in ("f32", "range", "rounded") or self.keep_f32

    @property
    def needs_scratch(self) -> bool:
        """Whether a row has to be kept between finding its range and quantizing it."""
        return self.epilogue == "row_u8" and self.prologue != "copy" and not self.keep_f32

    @property
    def name(self) -> str:
        """A name that says all that the code depends on."""
        parts = [self.prologue, self.epilogue]
        if self.prologue in NORMS:
            parts.append("e" + struct.pack(">f", self.eps).hex())
        if self.pair is not None:
            parts += [self.other, self.pair.function, "first" if self.pair.first else "second"]
        if self.residual:
            parts.append("res")
        if self.epilogue == "block":
            parts.append(f"g{self.group_size}")
        if self.epilogue in ("row_u8", "static_u8"):
            parts.append(f"{self.storage}_k{self.k_padded}")
        if self.epilogue in ("block", "row_u8", "static_u8") and self.keep_f32:
            parts.append("keep")
        if self.groups > 1:
            parts.append(f"groups{self.groups}")
        return "_".join(["row", *parts, f"m{self.m}", f"d{self.d}"])

    @property
    def numbers(self) -> dict[str, float]:
        """What the kernel's input ``numbers``, float32 (len(numbers),), holds, in order."""
        numbers = {} if self.pair is None else self.pair.numbers
        if self.prologue == "rescale":
            numbers["unit"] = self.unit
        if self.epilogue in STATIC:
            numbers |= {"scale": self.scale, "low": self.low, "high": self.high}
        return numbers

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The kernel's inputs, in order."""
        m, d, width = self.m, self.d, self.groups * self.d
        tensors = [Tensor("x", (m, 2 * d if self.prologue in GATED else width), "float32")]
        if self.residual:
            tensors.append(Tensor("residual", (m, width), "float32"))
        if self.prologue in NORMS:
            tensors.append(Tensor("gamma", (d,), "float32"))
        if self.prologue == "layer_norm":
            tensors.append(Tensor("beta", (d,), "float32"))
        if self.prologue == "swiglu":
            tensors.append(Tensor("constants", (3,), "float32"))
        if self.prologue == "rescale":
            tensors.append(Tensor("steps", (d,), "float32"))
        if self.pair is not None:
            shapes = {"rows": (m, d), "features": (d,), "number": (m, 1)}
            tensors.append(Tensor("other", shapes[self.other], "float32"))
        if self.numbers:
            tensors.append(Tensor("numbers", (len(self.numbers),), "float32"))
        return tuple(tensors)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The kernel's outputs, in order."""
        m, width = self.m, self.groups * self.d
        tensors = []
        if self.residual:
            tensors.append(Tensor("sum", (m, width), "float32"))
        if self.stores_y:
            tensors.append(Tensor("y", (m, width), "float32"))
        if self.epilogue == "block":
            tensors += [
                Tensor("xq", (m, self.k_padded), "int8"),
                Tensor("xs", (m, self.blocks), "float32"),
                Tensor("xsum", (m, self.blocks), "float32"),
            ]
        if self.epilogue in ("row_u8", "static_u8"):
            tensors += [
                Tensor("xq", (m, self.k_padded), self.storage),
                Tensor("xs", (m,), "float32"),
                Tensor("xz", (m,), "int32"),
            ]
        if self.epilogue == "range":
            padded = -(-m // LANES) * LANES  # whole vectors can be read
            tensors += [Tensor("low", (padded,), "float32"), Tensor("high", (padded,), "float32")]
        return tuple(tensors)

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        """The memory that each thread needs of its own."""
        return (Tensor("scratch", (self.d,), "float32"),) if self.needs_scratch else ()
