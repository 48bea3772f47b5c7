"""Single operators on integers, imported, give the bits that onnxruntime gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper

from slmtvm.importer.emit.emit import Emitter
from slmtvm.importer.frame.lengths import freeze_twice
from slmtvm.importer.freeze.roles import assign_roles
from slmtvm.importer.read.load import load
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.recognisers import recognise
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.passes.toy import decoder

LEVELS = 256
DRAWS = 12
INPUTS, OUTPUTS = 9, 61  # of a product
# Shapes of constants beside integers (1, tokens, LEVELS).
SHAPES = {"features": (LEVELS,), "number": (), "numbers": (1, 1, 1)}


def draws(exact: bool) -> list[tuple[np.float32, ...]]:
    """Scales of both sides and of the result. Those of few bits meet ties at every turn."""
    rng = np.random.default_rng(int(exact))
    if exact:
        found = rng.integers(1, 16, (DRAWS, 3)) * 2.0 ** -rng.integers(1, 8, (DRAWS, 3))
    else:
        found = 2.0 ** rng.uniform(-8, 2, (DRAWS, 3))
    return [tuple(row) for row in found.astype(np.float32)]


class Node:
    """One operator on rows of tokens: those of token t hold the t-th integer, LEVELS times."""

    def __init__(self, op: str, dtype: type, scales: tuple[np.float32, ...], seed: int) -> None:
        self.b, self.op, self.dtype, self.scales = GraphBuilder(None), op, dtype, scales
        limits = np.iinfo(dtype)
        self.levels = np.arange(limits.min, limits.max + 1).astype(dtype)
        rng = np.random.default_rng(seed)
        self.zeros = rng.integers(limits.min, limits.max + 1, 3)

    def tokenwise(self) -> str:
        return self.rows(np.repeat(self.levels[:, None], LEVELS, axis=1))

    def rows(self, table: np.ndarray) -> str:
        """Rows of a table of integers."""
        return self.b.op("Gather", self.b.constant(table, self.dtype), "input_ids", axis=0)

    def numbers(self, side: int) -> list[str]:
        """Scale and zero point of an operand, or of the result, the last."""
        return [
            self.b.constant(self.scales[side]),
            self.b.constant(self.zeros[side], self.dtype),
        ]

    def pair(self, left: str, right: str, folder: Path) -> Path:
        made = self.b.op(
            self.op, left, *self.numbers(0), right, *self.numbers(1), *self.numbers(2),
            domain="com.microsoft",
        )  # fmt: skip
        return self.save(made, folder)

    def product(self, by_column: bool, folder: Path) -> Path:
        """Of random rows and weights; scales of the latter are one, or one for each column."""
        rng = np.random.default_rng(0)
        x = self.rows(rng.choice(self.levels, (LEVELS, INPUTS)))
        bias = []
        if self.op == "QGemm":  # only of matrices
            x = self.b.op("Reshape", x, self.b.ints(-1, INPUTS))
            bias = [self.b.constant(rng.integers(-999, 1000, OUTPUTS), np.int32)]
        columns = OUTPUTS if by_column else 1
        scales = self.scales[1] * rng.choice(np.float32([1, 0.5, 1.25]), columns)
        weight = [
            self.b.constant(rng.integers(-128, 128, (INPUTS, OUTPUTS)), np.int8),
            self.b.constant(scales if by_column else scales[0]),
            self.b.constant(np.zeros(columns) if by_column else 0, np.int8),
        ]
        self.scales = (*self.scales[:2], self.scales[2] * LEVELS)
        domain = "com.microsoft" if bias else ""
        made = self.b.op(
            self.op, x, *self.numbers(0), *weight, *bias, *self.numbers(2), domain=domain
        )
        return self.save(made, folder)

    def save(self, made: str, folder: Path) -> Path:
        output = self.b.op("DequantizeLinear", made, *self.numbers(2))
        if self.op == "QGemm":
            output = self.b.op("Reshape", output, self.b.ints(1, -1, OUTPUTS))
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        return save(self.b.model([ids], [result]), folder)


def imported(path: Path) -> CanonicalModel:
    """The one operator as a model, which is none that the importer takes."""
    graph = load(path)
    roles = assign_roles(graph)
    cover = Cover(freeze_twice(graph, roles, LEVELS), roles.tokens.name, recognise)
    output = graph.outputs[0].name
    rows = cover.run(output)
    emitter = Emitter(str(path))
    main = emitter.function("main", cover.steps, [rows])
    return replace(
        decoder("f32"), module=tvm.IRModule({"main": main}), params=emitter.params, kind="encoder"
    )


def check(path: Path) -> None:
    tokens = np.arange(LEVELS)
    np.testing.assert_array_equal(evaluate(imported(path), tokens), run_onnxruntime(path, tokens))


@pytest.mark.parametrize("exact", [False, True], ids=["any", "few_bits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_every_pair_of_integers_is_rounded_as_onnxruntime_does(
    op: str, dtype: type, exact: bool, tmp_path: Path
) -> None:
    for seed, scales in enumerate(draws(exact)):
        node = Node(op, dtype, scales, seed)
        check(node.pair(node.tokenwise(), node.rows(np.tile(node.levels, (LEVELS, 1))), tmp_path))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_constants_come_in_the_order_in_which_onnxruntime_adds_them(
    op: str, first: bool, shape: str, tmp_path: Path
) -> None:
    for seed, scales in enumerate(draws(exact=True)):
        node = Node(op, np.uint8, scales, seed)
        values = node.levels if shape == "features" else node.levels[200 - seed]
        constant = node.b.constant(np.reshape(values, SHAPES[shape]), np.uint8)
        rows = node.tokenwise()
        check(node.pair(*((constant, rows) if first else (rows, constant)), tmp_path))


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_one_number_of_each_token_meets_all_of_its_features(
    op: str, first: bool, tmp_path: Path
) -> None:
    for seed, scales in enumerate(draws(exact=True)):
        node = Node(op, np.uint8, scales, seed)
        rows, number = node.rows(np.tile(node.levels, (LEVELS, 1))), node.rows(node.levels[:, None])
        check(node.pair(*((number, rows) if first else (rows, number)), tmp_path))


def test_numbers_of_tokens_meet_constant_features(tmp_path: Path) -> None:
    for seed, scales in enumerate(draws(exact=True)):
        node = Node("QLinearAdd", np.uint8, scales, seed)
        number, constant = node.rows(node.levels[:, None]), node.b.constant(node.levels, np.uint8)
        check(node.pair(constant, number, tmp_path))


@pytest.mark.parametrize("by_column", [False, True], ids=["tensor", "column"])
@pytest.mark.parametrize("op", ["QLinearMatMul", "QGemm"])
def test_sums_of_products_are_rounded_as_onnxruntime_does(
    op: str, by_column: bool, tmp_path: Path
) -> None:
    for seed, scales in enumerate(draws(exact=True)):
        check(Node(op, np.uint8, scales, seed).product(by_column, tmp_path))
