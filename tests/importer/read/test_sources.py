"""How encoder-decoders write the positions, the scales and the padding of a source."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.verify.reference import Reference
from tests.importer.graphs import count_positions
from tests.importer.test_encoder_decoder import (
    DIM,
    HEAD_DIM,
    SOURCE,
    TOKENS,
    Builder,
    check_rounded,
    one_file,
    two_files,
    with_rounded_heads,
)

POSITIONS, OFFSET = 43, 2  # rows of a table, and the first that a sequence reads
PADDING = 1
WAYS = {
    "one file": lambda folder, kind: one_file(folder, late_batch=False, kind=kind),
    "one file, sizes from the decoder": lambda folder, kind: one_file(
        folder, late_batch=True, kind=kind
    ),
    "two files": two_files,
}


def check(path, tokens=TOKENS, source=SOURCE):
    model = import_onnx(path)
    want = Reference(path).rows(tokens, source)
    assert np.abs(evaluate(model, tokens, source) - want).max() < 1e-5 * np.ptp(want)
    return model


class WithPositions(Builder):
    """Rows of a table that begin after two others, as BART's do."""

    def embed(self, table: str, ids: str) -> str:
        length = self.op("Squeeze", self.op("Shape", ids, start=1, end=2))
        step, offset = (self.constant(n, np.int64) for n in (1, OFFSET))
        places = self.op("Range", self.constant(0, np.int64), length, step)
        rows = self.op("Gather", self.near(0, POSITIONS, DIM), self.op("Add", places, offset))
        return self.op("Add", super().embed(table, ids), rows)


@pytest.mark.parametrize("way", WAYS)
def test_a_source_is_as_long_as_its_table_of_positions(way, tmp_path):
    model = check(WAYS[way](tmp_path, WithPositions))
    assert (model.context, model.source_context) == (POSITIONS - OFFSET, POSITIONS - OFFSET)


class WithConstantScale(Builder):
    """Queries and keys are each scaled by the root of the scale, as torch exports attention."""

    def scaled(self, queries: str, keys: str) -> tuple[str, str]:
        root = self.root(queries)
        return self.op("Mul", queries, root), self.op("Mul", keys, root)

    def root(self, queries: str) -> str:
        return self.constant(HEAD_DIM**-0.25)


class WithScaleOfSizes(WithConstantScale):
    """The scale is computed from the size of the queries' heads."""

    def root(self, queries: str) -> str:
        size = self.op("Cast", self.op("Shape", queries, start=3, end=4), to=TensorProto.FLOAT)
        scale = self.op("Div", self.constant([1.0]), self.op("Sqrt", size))
        return self.op("Sqrt", scale)


class WithDividedKeys(Builder):
    """Keys alone are divided."""

    def scaled(self, queries: str, keys: str) -> tuple[str, str]:
        return queries, self.op("Div", keys, self.constant(3.7))


@pytest.mark.parametrize("kind", [WithConstantScale, WithScaleOfSizes, WithDividedKeys])
@pytest.mark.parametrize("way", WAYS)
def test_keys_of_a_source_may_be_scaled(way, kind, tmp_path):
    model = check(WAYS[way](tmp_path, kind))
    assert not [note for note in model.notes if "multiply" in note], "it is a part of the scale"


@pytest.mark.parametrize("kind", [WithConstantScale, WithDividedKeys])
@pytest.mark.parametrize("late_batch", [False, True])
def test_scaled_keys_of_a_source_may_be_rounded(late_batch, kind, tmp_path):
    path = one_file(tmp_path, late_batch=late_batch, kind=kind)
    onnx.save(with_rounded_heads(onnx.load(path)), path)
    check_rounded(path)


def test_values_of_a_source_that_the_decoder_scales_are_refused(tmp_path):
    path = one_file(tmp_path, late_batch=True)
    model = onnx.load(path)
    last = [n for n in model.graph.node if n.op_type == "MatMul" and "Softmax" in n.input[0]][-1]
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [], [2.0])
    model.graph.initializer.append(factor)
    scaled = helper.make_node("Mul", [last.input[1], "factor"], ["scaled"])
    last.input[1] = "scaled"
    model.graph.node.insert(list(model.graph.node).index(last), scaled)
    onnx.save(model, path)
    with pytest.raises(
        UnsupportedOpError,
        match=rf"{last.name}.*values of the source are multiplied by .*multiply the weights",
    ):
        import_onnx(path)


class WithoutPadding(Builder):
    """Positions count tokens that are not padding, as those of M2M100 do, and a mask hides it."""

    more_inputs = (
        helper.make_tensor_value_info(
            "attention_mask", TensorProto.INT64, ["batch", "input_ids_length"]
        ),
    )

    def embed(self, table: str, ids: str) -> str:
        rows = self.op("Gather", self.near(0, POSITIONS, DIM), count_positions(self, ids, PADDING))
        return self.op("Add", super().embed(table, ids), rows)

    def over_source(self, scores: str) -> str:
        visible = self.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        hidden = self.op("Sub", self.constant(1.0), visible)
        each = self.op("Unsqueeze", hidden, self.ints(1, 2))
        return self.op("Add", scores, self.op("Mul", each, self.constant(-1e9)))


def test_positions_of_a_source_may_leave_out_padding(tmp_path):
    path = one_file(tmp_path, late_batch=False, kind=WithoutPadding)
    source, tokens = (np.where(ids == PADDING, PADDING + 1, ids) for ids in (SOURCE, TOKENS))
    model = check(path, tokens, source)
    assert model.padding == (PADDING,)
    assert "without padding" in model.notes[0]
    masked = import_onnx(path, mask="arbitrary")
    assert masked.mask == "skip"
    visible = np.arange(len(source)) % 4 > 0
    padded = np.where(visible, source, PADDING)
    want = Reference(path).rows(tokens, padded, visible)
    got = evaluate(masked, tokens, padded, mask=visible)
    assert np.abs(got - want).max() < 1e-5 * np.ptp(want)
