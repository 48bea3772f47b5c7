"""Every operator of the importer's table against onnxruntime, on small arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from slmtvm.importer.graph import Constant, Graph, Node
from slmtvm.importer.operators import MAX_OPSET, Kind, find, registered
from slmtvm.importer.operators.compute import compute
from slmtvm.verify.exact_sums import exact_session

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(2, 3, 4)) * 3).astype(np.float32)
Y = RNG.normal(size=(3, 4)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.1)
INTEGERS = RNG.integers(-9, 9, (2, 3, 4))
TRUE_FALSE = X > 0
WITH_NAN = np.where(TRUE_FALSE, X, np.float32(np.nan)).astype(np.float32)
# Zeros, ties, infinities, what is no number, and values far outside of any range.
SPECIAL = np.float32(
    [[0.0, -0.0, 0.125, 0.375], [-0.125, -0.375, np.inf, -np.inf], [np.nan, 3e38, -3e38, 1e-42]]
)
ODD_RANGES = [
    [-3e38, 3e38, 1], [np.nan, 1, 2], [1, np.nan, -2], [np.inf, 1, -2], [-np.inf, 1, np.inf],
    [np.nan, np.nan, np.nan], [-1, -2, -3], [1e-40, 2e-40, 0], [0, -0.0, 0],
]  # fmt: skip


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: Any, dtype: Any = np.int64) -> np.ndarray:
    return np.array(value, dtype)


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[np.ndarray | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    domain: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.opset}-{list(self.attrs.values())}"


def nbits(bits: int, *given: str) -> tuple[np.ndarray | None, ...]:
    """Inputs of a MatMulNBits from 40 features to 3 in blocks of 16; given: the optional ones."""
    rng = np.random.default_rng(bits)
    x, scales = rng.normal(size=(2, 5, 40)), rng.random(9) + 0.5
    weight = rng.integers(0, 256, (3, 3, 2 * bits), dtype=np.uint8)
    zeros = {
        "packed": rng.integers(0, 256, 3 * -(-3 * bits // 8), dtype=np.uint8),
        "float": (rng.random(9) * 8).astype(np.float32),
    }
    return (
        x.astype(np.float32), weight, scales.astype(np.float32),
        next((zeros[kind] for kind in given if kind in zeros), None),
        rng.permutation(np.arange(40) // 16).astype(np.int32) if "index" in given else None,
        rng.normal(size=3).astype(np.float32) if "bias" in given else None,
    )  # fmt: skip


def bnb4() -> tuple[np.ndarray, ...]:
    """Inputs of a MatMulBnb4 from 40 features to 3 in blocks of 16."""
    rng = np.random.default_rng(4)
    weight = rng.integers(0, 256, 60, dtype=np.uint8)
    return (
        rng.normal(size=(2, 5, 40)).astype(np.float32),
        weight,
        (rng.random(8) + 0.5).astype(np.float32),
    )


FLOAT_UNARY = [
    "Abs", "Ceil", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
    "Softplus", "Softsign", "Tan", "Tanh",
]  # fmt: skip
REDUCTIONS = ["L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
CASES = [
    *(Case(op, (X,)) for op in FLOAT_UNARY),
    *(Case(op, (POSITIVE,)) for op in ("Log", "Sqrt")),
    *(Case(op, (X, Y)) for op in ("Add", "Sub", "Mul", "Div", "Greater", "Less", "Equal")),
    *(Case(op, (X, Y)) for op in ("GreaterOrEqual", "LessOrEqual")),
    *(Case(op, (X, Y, X)) for op in ("Max", "Min", "Sum", "Mean")),
    *(Case(op, (TRUE_FALSE, TRUE_FALSE[:1])) for op in ("And", "Or", "Xor")),
    *(Case(f"Reduce{r}", (X, i64(-1, 0)), {"keepdims": 0}) for r in REDUCTIONS),
    *(Case(f"Reduce{r}", (X,), {"axes": [1]}, 11) for r in REDUCTIONS),
    Case("ReduceMean", (X,)),
    Case("ReduceSum", (X, i64()), {"noop_with_empty_axes": 1}),
    Case("Not", (TRUE_FALSE,)),
    Case("IsNaN", (WITH_NAN,)),
    Case("IsInf", (np.array([0, np.inf, -np.inf, np.nan, 3e38], np.float32),)),
    Case("IsInf", (np.array([0, np.inf, -np.inf], np.float32),), {"detect_negative": 0}),
    Case("IsInf", (np.array([0, np.inf, -np.inf], np.float32),), {"detect_positive": 0}),
    Case("Div", (INTEGERS, i64(3))),
    Case("Div", (INTEGERS, i64(-4))),
    Case("Mod", (INTEGERS, i64(5))),
    Case("Mod", (INTEGERS, i64(-5)), {"fmod": 1}),
    Case("Mod", (X, np.array([1.5], np.float32)), {"fmod": 1}),
    Case("Pow", (POSITIVE, np.array(-0.5, np.float32))),
    Case("Pow", (INTEGERS, np.array(2.0, np.float32))),
    Case("Where", (TRUE_FALSE, X, Y)),
    Case("Clip", (X, scalar(-1, np.float32), scalar(2, np.float32))),
    Case("Clip", (X, None, scalar(2, np.float32))),
    Case("Clip", (X,), {"min": -1.0, "max": 0.5}, 10),
    Case("PRelu", (X, Y)),
    Case("Gelu", (X,), {}, 20),
    Case("Gelu", (X,), {"approximate": "tanh"}, 20),
    Case("Gelu", (X,), domain="com.microsoft"),
    Case("Swish", (X,), {"alpha": 1.25}, 24),
    Case("Cast", (X,), {"to": 7}),
    Case("Cast", (X,), {"to": 9}),
    Case("Cast", (X,), {"to": 10}),
    Case("Cast", (INTEGERS,), {"to": 1}),
    Case("CastLike", (X, INTEGERS)),
    Case("Shape", (X,)),
    Case("Shape", (X,), {"start": -2, "end": 3}),
    Case("Shape", (X,), {}, 13),
    Case("Size", (X,)),
    Case("Constant", (), {"value": numpy_helper.from_array(Y)}),
    Case("Constant", (), {"value_ints": [3, 4]}),
    Case("Constant", (), {"value_float": 2.5}),
    Case("Range", (scalar(2), scalar(11), scalar(3))),
    Case("Range", (scalar(5.0, np.float32), scalar(1, np.float32), scalar(-1.5, np.float32))),
    Case("ConstantOfShape", (i64(2, 3),), {"value": numpy_helper.from_array(i64(7))}),
    Case("ConstantOfShape", (i64(2, 0),)),
    Case("EyeLike", (Y,), {"k": 1}),
    Case("Trilu", (X, scalar(1)), {"upper": 1}),
    Case("Trilu", (X,), {"upper": 0}),
    Case("OneHot", (INTEGERS, scalar(12), np.array([0.5, 2], np.float32)), {"axis": 1}),
    Case("NonZero", (INTEGERS,)),
    Case("TopK", (X, i64(3)), {"axis": -1}, outputs=2),
    Case("TopK", (X, i64(2)), {"axis": 1, "largest": 0}, outputs=2),
    Case("Conv", (X, RNG.normal(size=(3, 1, 2)).astype(np.float32)), {"group": 3, "pads": [1, 0]}),
    Case("ConvInteger", ((INTEGERS + 9).astype(np.uint8), INTEGERS[0, :, None, :2].astype(np.int8),
                         scalar(5, np.uint8), scalar(-3, np.int8)), {"group": 3, "pads": [1, 0]}),
    Case("Conv", (X, RNG.normal(size=(6, 3, 2)).astype(np.float32), np.ones(6, np.float32))),
    Case(
        "CausalConvWithState",
        (X, RNG.normal(size=(3, 1, 3)).astype(np.float32), None, X[:, :, :2]),
        {"activation": "silu"},
        domain="com.microsoft",
        outputs=2,
    ),
    Case("ScatterElements", (X, INTEGERS[:1] % 3, X[:1] * 2), {"axis": 1}),
    Case("ScatterElements", (X, INTEGERS[:1] % 3, X[:1] * 2), {"axis": 1, "reduction": "add"}),
    Case(
        "ScatterND",
        (Y, np.array([[0], [2], [0]]), RNG.normal(size=(3, 4)).astype(np.float32)),
        {"reduction": "add"},
    ),
    Case("ScatterND", (Y, np.array([[0, 1], [2, 3]]), np.array([9, 8], np.float32))),
    Case("GatherND", (Y, np.array([[0, 1], [2, 3]]))),
    Case("Reshape", (X, i64(0, -1, 2))),
    Case("Reshape", (X[:0], i64(0, 4, 3)), {"allowzero": 1}),
    Case("Flatten", (X,), {"axis": 2}),
    Case("Flatten", (X,), {"axis": -1}),
    Case("Transpose", (X,), {"perm": [2, 0, 1]}),
    Case("Transpose", (X,)),
    Case("Unsqueeze", (X, i64(0, -1))),
    Case("Unsqueeze", (X,), {"axes": [1]}, 11),
    Case("Squeeze", (X[:1], i64(0))),
    Case("Squeeze", (X[:1],)),
    Case("Squeeze", (X[:1],), {"axes": [0]}, 11),
    Case("Slice", (X, i64(-3, 1), i64(1 << 62, 3), i64(1, 2), i64(2, 1))),
    Case("Slice", (X, i64(3), i64(-(1 << 62)), i64(2), i64(-1))),
    Case("Slice", (X, i64(-1), i64(0), i64(2), i64(-2))),
    Case("Slice", (X, i64(0, 1), i64(1, 3))),
    Case("Slice", (X,), {"starts": [1], "ends": [99], "axes": [2]}, 9),
    Case("Concat", (X, X[:, :1], X), {"axis": 1}),
    Case("Split", (X, i64(1, 2, 1)), {"axis": 2}, outputs=3),
    Case("Split", (X,), {"axis": 2, "num_outputs": 2}, outputs=2),
    Case("Split", (X,), {"axis": -1}, 13, outputs=2),
    Case("Split", (X,), {"axis": 1, "split": [1, 2]}, 11, outputs=2),
    Case("Expand", (Y[:, None], i64(2, 1, 5, 1))),
    Case("Tile", (Y, i64(2, 3))),
    Case("Pad", (X, i64(0, 1, 2, 0, 3, 0))),
    Case("Pad", (X, i64(0, 1, -1, 0, -2, 0), scalar(-1.5, np.float32)), {}, 13),
    Case("Pad", (X, i64(1, 0, 2, 3), scalar(2, np.float32), i64(-1, 0))),
    Case("Pad", (X, i64(0, 1, 2, 0, 1, 0)), {"mode": "edge"}),
    Case("Pad", (X, i64(0, 1, 2, 0, 1, 0)), {"mode": "reflect"}),
    Case("Pad", (X,), {"pads": [0, 1, 2, 0, 3, 0], "value": 0.5}, 9),
    Case("Gather", (X, INTEGERS[0] % 3), {"axis": 1}),
    Case("Gather", (Y, i64(-1, 0, 1))),
    Case("Gather", (Y, np.array([[1, 2]]))),
    Case("GatherElements", (X, INTEGERS % 3), {"axis": 1}),
    Case("Softmax", (X,), {"axis": 1}),
    Case("Softmax", (X,), {"axis": 1}, 11),
    Case("LogSoftmax", (X,), {"axis": -1}),
    Case("CumSum", (X, scalar(1)), {"exclusive": 1, "reverse": 1}),
    Case("CumSum", (INTEGERS, scalar(-1))),
    Case("ArgMax", (X,), {"axis": 1, "keepdims": 0}),
    Case("ArgMax", (INTEGERS % 2,), {"axis": -1, "select_last_index": 1}),
    Case("LayerNormalization", (X, Y[0], Y[1]), {"epsilon": 1e-3}),
    Case("LayerNormalization", (X, Y), {"axis": 1}),
    Case("SimplifiedLayerNormalization", (X, Y[0]), {"epsilon": 1e-3}),
    Case("RMSNormalization", (X, Y[0]), {"epsilon": 1e-3}, 23),
    Case("LpNormalization", (X,), {"axis": 1}),
    Case("LpNormalization", (X,), {"p": 1}),
    Case("MatMul", (X, Y.T)),
    Case("MatMul", (X, X.transpose(0, 2, 1))),
    Case("Gemm", (Y, Y, Y[:, :3]), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", (Y, Y[:, :2]), {"transA": 1}),
    Case("MatMulInteger", ((INTEGERS[0] + 9).astype(np.uint8), INTEGERS[1].T.astype(np.int8),
                           scalar(3, np.uint8), scalar(-2, np.int8))),
    *(Case("MatMulNBits", nbits(bits, *given), {
        "K": 40, "N": 3, "bits": bits, "block_size": 16,
      }, domain="com.microsoft")
      for bits, given in ((4, ()), (4, ("packed",)), (4, ("float", "bias")),
                                 (8, ("packed", "bias")), (2, ("packed",)),
                                 (4, ("index",)))),
    *(Case("MatMulBnb4", bnb4(), {"K": 40, "N": 3, "block_size": 16, "quant_type": kind},
           domain="com.microsoft") for kind in (0, 1)),
    Case("DequantizeLinear", (INTEGERS[0].astype(np.int8), np.float32([0.5, 2, 3]),
                              np.int8([1, 0, -1])), {"axis": 0}),
    Case("DequantizeLinear", ((INTEGERS + 9).astype(np.uint8), scalar(0.5, np.float32),
                              scalar(3, np.uint8))),
    Case("DequantizeLinear", (INTEGERS[0].astype(np.int8), np.abs(Y[:, :2])),
         {"axis": 1, "block_size": 2}, 21),
    Case("DequantizeLinear", (INTEGERS[0].astype(np.uint16), scalar(0.5, np.float32),
                              scalar(3, np.uint16)), domain="com.microsoft"),
    *(Case("QuantizeLinear", (SPECIAL, scalar(0.25, np.float32), scalar(zero, dtype)), {}, 21)
      for dtype, zero in ((np.uint8, 3), (np.int8, -7), (np.uint16, 300), (np.int16, 0))),
    Case("QuantizeLinear", (SPECIAL, np.float32([0.5, 2, 3, 1]), np.int8([1, 0, -1, 5]))),
    Case("QuantizeLinear", (SPECIAL, scalar(0.25, np.float32), scalar(9, np.uint16)),
         domain="com.microsoft"),
    Case("DynamicQuantizeLinear", (X,), outputs=3),
    Case("DynamicQuantizeLinear", (np.float32([[0.5, 1.5, 2.5, 127.5, -127.5]]),), outputs=3),
    *(Case("DynamicQuantizeLinear", (np.float32([row]),), outputs=3) for row in ODD_RANGES),
    Case("DynamicQuantizeLinear", (POSITIVE,), outputs=3),
    Case("DynamicQuantizeLinear", (np.zeros((2, 2), np.float32),), outputs=3),
]  # fmt: skip
# Packed tables never go through evaluate, nor do whole layers: importing models covers them.
PACKED = {("com.microsoft", "GatherBlockQuantized")}


def feeds(case: Case) -> dict[str, np.ndarray]:
    return {f"x{i}": x for i, x in enumerate(case.inputs) if x is not None}


def loaded(value: Any) -> Any:
    """An attribute as ``load`` hands it on."""
    if isinstance(value, onnx.TensorProto):
        return Constant.of("value", numpy_helper.to_array(value))
    return tuple(value) if isinstance(value, list) else value


def onnx_model(case: Case) -> onnx.ModelProto:
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(case.inputs)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, domain=case.domain, **case.attrs)
    ports = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for k, v in feeds(case).items()
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", ports, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnxruntime_computes(case):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = exact_session(onnx_model(case), options)
    want = session.run(None, feeds(case))
    attrs = {k: loaded(v) for k, v in case.attrs.items()}
    version = 1 if case.domain else case.opset
    names = tuple(f"y{i}" for i in range(case.outputs))
    node = Node(case.domain, case.op, version, "", (), names, attrs)
    got = compute(Graph("", (), (), (), {}), node, case.inputs)
    for a, b in zip(got, want, strict=False):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
        else:
            np.testing.assert_array_equal(a, b)


def test_every_operator_and_version_of_the_table_has_a_case():
    covered = {
        id(find(c.domain, c.op, 1 if c.domain else c.opset)) for c in CASES
    }  # the entry that the case used
    missing = [
        f"{e.domain}.{e.op_type} from {e.since}"
        for e in registered()
        if id(e) not in covered
        and e.kind not in (Kind.FUSED, Kind.BRANCH)
        and (e.domain, e.op_type) not in PACKED
    ]
    assert missing == []


@pytest.mark.slow
def test_an_entry_begins_where_onnx_changed_the_operator():
    """An entry for a version at which onnx has no new definition would be a misreading."""
    for entry in registered():
        if entry.domain or not onnx.defs.has(entry.op_type, MAX_OPSET, ""):
            continue
        first = {
            s.since_version
            for s in onnx.defs.get_all_schemas_with_history()
            if s.name == entry.op_type and s.domain == ""
        }
        assert entry.since in first or entry.since < min(first), entry


def test_an_empty_piece_of_another_width_is_left_out_as_onnxruntime_does_where_sizes_are_dynamic():
    node = Node("", "Concat", 18, "", (), ("y",), {"axis": 1})
    empty = np.zeros((2, 0, 0), np.float32)
    (got,) = compute(Graph("", (), (), (), {}), node, (empty, X))
    np.testing.assert_array_equal(got, X)
    (nothing,) = compute(Graph("", (), (), (), {}), node, (empty, empty))
    assert nothing.shape == empty.shape
