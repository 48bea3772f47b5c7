"""Integer matrix products whose scales, quantization or bias are fused into them."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from slmtvm.importer.expand.registry import MICROSOFT, expansion
from slmtvm.importer.expand.site import Site


@expansion("DynamicQuantizeMatMul", 1, MICROSOFT, arity=(3, 5))
def dynamic_quantize_matmul(site: Site) -> Sequence[str]:
    """Inputs: x, weight, its scale, its zero point, bias."""
    x, weight, weight_scale, weight_zero, bias = (site.input(i) for i in range(5))
    levels, scale, zero = site.op("DynamicQuantizeLinear", x, outputs=3)
    return [
        scaled_product(site, (levels, weight), (zero, weight_zero), (scale, weight_scale), bias)
    ]


@expansion("MatMulIntegerToFloat", 1, MICROSOFT, arity=(4, 7))
def matmul_integer_to_float(site: Site) -> Sequence[str]:
    """Inputs: x, weight, the scales of both, the zero points of both, bias."""
    x, weight, scale, weight_scale, zero, weight_zero, bias = (site.input(i) for i in range(7))
    return [scaled_product(site, (x, weight), (zero, weight_zero), (scale, weight_scale), bias)]


def scaled_product(
    site: Site, sides: tuple[str, str], zeros: tuple[str, str], scales: tuple[str, str], bias: str
) -> str:
    """``(left - zero) @ (right - zero)`` times both scales, plus the bias if there is one."""
    product = site.op("MatMulInteger", *sides, *zeros)
    number = site.op("Cast", product, to=TensorProto.FLOAT)
    result = site.op("Mul", number, site.op("Mul", *scales))
    return str(site.op("Add", result, bias) if bias else result)
