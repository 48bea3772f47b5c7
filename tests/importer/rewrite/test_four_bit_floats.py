"""Weights in bitsandbytes' types of 4 bits compute what onnxruntime computes with them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from tests.importer.graph_builder import save
from tests.importer.graphs import build
from tests.importer.quantized import TINY, check


def in_four_bits(kind: int = MatMulBnb4Quantizer.NF4) -> onnx.ModelProto:
    quantizer = MatMulBnb4Quantizer(build(TINY), kind, block_size=16)
    quantizer.process()
    model: onnx.ModelProto = quantizer.model.model
    assert any(node.op_type == "MatMulBnb4" for node in model.graph.node)
    return model


@pytest.mark.parametrize("kind", [MatMulBnb4Quantizer.FP4, MatMulBnb4Quantizer.NF4])
def test_weights_are_expanded_and_the_cost_is_said(kind: int, tmp_path: Path) -> None:
    model = check(save(in_four_bits(kind), tmp_path))
    said = [note for note in model.notes if "is expanded to float32, 8 times its size" in note]
    assert len(said) == sum(node.op_type == "MatMulBnb4" for node in in_four_bits().graph.node)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = in_four_bits()
    node = next(node for node in model.graph.node if node.op_type == "MatMulBnb4")
    weight = next(i for i in model.graph.initializer if i.name == node.input[1])
    weight.dims[0] -= 1
    weight.raw_data = weight.raw_data[:-1]
    with pytest.raises(InvalidModelError, match=rf"weight '{weight.name}' of \d+ uint8 where N="):
        import_onnx(save(model, tmp_path), context=32)


def test_unknown_types_are_refused(tmp_path: Path) -> None:
    model = in_four_bits()
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "quant_type":
                attribute.i = 2
    with pytest.raises((InvalidModelError, UnsupportedOpError), match="quant_type"):
        import_onnx(save(model, tmp_path), context=32)
