"""Random and extreme operands for linear kernels, and what they mean apart from ``reference``."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from slmtvm.schedules import linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from tests.schedules.harness import run

FLOATS = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


_FIELDS = {"int2": 2, "int4": 4}  # formats with several values in a byte, and their bits


@dataclass(frozen=True)
class Case:
    """Operands as the kernel and ``pack`` take them."""

    shape: LinearShape
    activations: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    addends: dict[str, np.ndarray]

    def reference(self) -> np.ndarray:
        return linear.reference(
            self.shape,
            *self.activations.values(),
            weights=linear.Weights(**self.weights),
            **self.addends,
        )

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """Dequantized x (m, k) and W (n, k), in float64."""
        shape, weights = self.shape, self.weights
        if shape.activation == "f32" and not shape.weight_only:
            return self.activations["x"].astype(float), weights["weight"].astype(float)
        # bfloat16 and float8 weights are numpy's own (ml_dtypes), which convert themselves.
        q = weights["weight"].astype(float if shape.weight_only else int)
        if shape.format in _FIELDS:
            bits = _FIELDS[shape.format]
            each, mask = 8 // bits, (1 << bits) - 1
            q = np.array([[int(row[k // each]) >> bits * (k % each) & mask for k in range(shape.k)]
                          for row in weights["weight"]])  # fmt: skip
        default = np.array({"int2": 2, "int4": 8}.get(shape.format, 0))
        zero = weights.get("zero_points", default).astype(float)
        scale = weights["scales"].astype(shape.scale_dtype).astype(float)
        if shape.group_channels:
            block = np.arange(shape.n) // shape.group_channels
            zero = np.broadcast_to(zero, scale.shape)
            return self.activations["x"].astype(float), (q - zero[block]) * scale[block]
        if shape.weight_only:
            group = np.arange(shape.k) // (shape.group_size or shape.k)
            zero = np.broadcast_to(zero, scale.shape)
            return self.activations["x"].astype(float), (q - zero[:, group]) * scale[:, group]
        xq, xs = self.activations["xq"].astype(int), self.activations["xs"].astype(float)
        k = np.arange(shape.k)
        if shape.activation == "block":
            group = k // shape.group_size
            zero = np.broadcast_to(zero, scale.shape)
            return xq[:, k] * xs[:, group], (q - zero[:, group]) * scale[:, group]
        xq = xq + 128 * (self.activations["xq"].dtype == np.int8)
        x = (xq[:, k] - self.activations["xz"].astype(int)[:, None]) * xs[:, None]
        return x, (q - zero.reshape(-1, 1)) * scale.reshape(-1, 1)

    def magnitude(self) -> np.ndarray:
        """What rounding errors are relative to: the sum of all terms' magnitudes, (m, n)."""
        x, w = self.operands()
        total = np.abs(x) @ np.abs(w).T
        for addend in self.addends.values():
            total = total + np.abs(addend)
        return total

    def run(
        self,
        target: Target,
        isa: Isa,
        knobs: dict[str, int] | None = None,
        cuts: tuple[int, ...] = (),
        valid: int = 0,
    ) -> np.ndarray:
        """y (m, n) as the kernel computes it; of a padded shape, its first ``valid`` rows."""
        kernel = linear.build(self.shape, isa, knobs)
        packed = linear.pack(self.shape, isa, linear.Weights(**self.weights))
        inputs = {**self.activations, **packed, **self.addends}
        cuts = tuple(min(cut, kernel.grid) for cut in cuts)
        return run(kernel, inputs, target, cuts=cuts, valid=valid)["y"]


def random_case(shape: LinearShape, isa: Isa, *, extreme: bool = False, seed: int = 0) -> Case:
    """Operands of ``shape``.

    ``extreme``: quantized values are the least and the largest only, and whole channels and rows
    of each; scales are powers of two, so that exact arithmetic gives exact results.
    """
    rng = np.random.default_rng(seed)
    m, n, k = shape.m, shape.n, shape.k

    def integers(low: int, high: int, size: tuple[int, ...], dtype: str) -> np.ndarray:
        """low..high included."""
        if not extreme:
            return rng.integers(low, high + 1, size).astype(dtype)
        values = rng.choice([low, high], size)
        values[::3] = high
        values[1::3] = low
        return values.astype(dtype)

    def scales(size: tuple[int, ...]) -> np.ndarray:
        sign = rng.choice([-1.0, 1.0], size)
        magnitude = np.full(size, 0.25) if extreme else rng.uniform(0.001, 0.03, size)
        return (sign * magnitude).astype(np.float32)

    addends: dict[str, np.ndarray] = {}
    if shape.has_bias:
        addends["bias"] = np.round(rng.standard_normal(n) * 8).astype(np.float32)
    if shape.has_residual:
        addends["residual"] = np.round(rng.standard_normal((m, n)) * 8).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    if shape.activation == "f32" and not shape.weight_only:
        weight = rng.standard_normal((n, k)).astype(FLOATS[shape.format])
        return Case(shape, {"x": x}, {"weight": weight}, addends)

    by_scale = (n,) if shape.activation == "row_u8" else (n, shape.groups)
    if shape.group_channels:
        by_scale = (-(-n // shape.group_channels), k)
    weights = {"scales": scales(by_scale)}
    if shape.format in FLOATS:
        weights["weight"] = rng.standard_normal((n, k)).astype(FLOATS[shape.format])
        return Case(shape, {"x": x}, weights, addends)
    if shape.format in _FIELDS:
        bits = _FIELDS[shape.format]
        each, largest = 8 // bits, (1 << bits) - 1
        values = integers(0, largest, (n, -(-k // each) * each), "uint8")
        parts = [values[:, i::each] << bits * i for i in range(each)]
        weights["weight"] = np.bitwise_or.reduce(parts)
        zero_points = integers(0, largest, by_scale, "uint8")
    else:
        largest = (1 << (shape.bits - 1)) - 1
        weights["weight"] = integers(-largest - 1, largest, (n, k), shape.format)
        zero_points = integers(-largest - 1, largest, by_scale, shape.format)
    if shape.float_zero_points:
        zero_points = rng.uniform(-3, 12, by_scale).astype(np.float32)
    if shape.has_zero_points:
        weights["zero_points"] = zero_points
    if shape.weight_only:
        return Case(shape, {"x": x}, weights, addends)

    if shape.activation == "block":
        xq = np.zeros((m, shape.padded_k), np.int8)
        xq[:, :k] = integers(-127, 127, (m, k), "int8")
        sums = xq.reshape(m, shape.groups, -1).sum(axis=2, dtype=np.int32)
        xs = np.abs(scales((m, shape.groups)))
        return Case(shape, {"xq": xq, "xs": xs, "xsum": sums.astype(np.float32)}, weights, addends)
    stored_as = 128 if isa.row_dtype == "int8" else 0
    xq = (integers(0, 255, (m, shape.padded_k), "int32") - stored_as).astype(isa.row_dtype)
    xz = integers(0, 255, (m,), "int32")
    return Case(shape, {"xq": xq, "xs": np.abs(scales((m,))), "xz": xz}, weights, addends)
