"""Every composite operator, written out, against onnxruntime's own, on small arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.expand import expand, registered_expansions
from slmtvm.importer.expand.registry import find_expansion
from slmtvm.importer.freeze.freeze import freeze
from slmtvm.importer.freeze.roles import assign_roles
from slmtvm.importer.read.load import load
from slmtvm.verify.exact_sums import exact_session

MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(0)
LENGTH = 97  # of the tokens, which no value here depends on; unlike any size


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[np.ndarray | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    domain: str = MICROSOFT
    opset: int = 18
    title: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.title}" if self.title else self.op


def model_of(case: Case) -> onnx.ModelProto:
    """The node on constants, beside tokens that nothing reads."""
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(case.inputs)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="op", domain=case.domain, **case.attrs)
    constants = [
        numpy_helper.from_array(x, name)
        for name, x in zip(names, case.inputs, strict=True)
        if x is not None
    ]
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    for port in results:
        port.type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph([node], "g", [tokens], results, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def expected(model: onnx.ModelProto) -> list[np.ndarray]:
    """What onnxruntime computes, every constant an input."""
    fed = onnx.ModelProto.FromString(model.SerializeToString())
    feeds = {t.name: numpy_helper.to_array(t) for t in fed.graph.initializer}
    del fed.graph.initializer[:], fed.graph.input[:]
    for output in fed.graph.output:
        output.ClearField("type")
    fed.graph.input.extend(
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for k, v in feeds.items()
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = exact_session(fed, options)
    return session.run(None, feeds)


def written_out(model: onnx.ModelProto, folder: Path) -> list[np.ndarray]:
    """The same by the primitive nodes."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    graph = load(path)
    roles = assign_roles(graph)
    primitive = expand(graph, roles, LENGTH)
    assert not [n for n in primitive.nodes if find_expansion(n.domain, n.op_type, n.version)]
    frozen = freeze(primitive, roles, LENGTH)
    return [frozen.constants[port.name].values() for port in graph.outputs]


X, ROW = floats(2, 5, 12), floats(12)

POINTWISE = [
    Case("BiasGelu", (X, ROW)),
    Case("FastGelu", (X, ROW)),
    Case("FastGelu", (X,), title="no bias"),
    Case("QuickGelu", (X,)),
    Case("QuickGelu", (X,), {"alpha": 1.0}, title="silu"),
]

PRODUCTS = [
    Case("FusedMatMul", (X, floats(12, 7))),
    Case("FusedMatMul", (X, floats(7, 12)), {"transB": 1, "alpha": 0.25}, title="turned"),
    Case("FusedMatMul", (floats(2, 12, 5), floats(2, 7, 12)), {"transA": 1, "transB": 1},
         title="both"),
    Case("FusedMatMul", (floats(5, 2, 3, 12), floats(2, 3, 7, 12)),
         {"transBatchA": 1, "transB": 1}, title="batch A"),
    Case("FusedMatMul", (floats(2, 3, 5, 12), floats(7, 2, 3, 12)),
         {"transBatchB": 1, "transB": 1}, title="batch B"),
    Case("FusedMatMul", (floats(12, 2, 3, 5), floats(2, 3, 12, 7)),
         {"transBatchA": 1, "transA": 1, "alpha": 2.0}, title="batch and matrix"),
    Case("TransposeMatMul", (X, floats(2, 7, 12)), {"transB": 1, "alpha": 0.5}),
    Case("FusedGemm", (X[0], floats(7, 12), floats(7)),
         {"transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "Relu"}),
    Case("FusedGemm", (X[0], floats(12, 7)), {"activation": "Tanh"}, title="tanh"),
    Case("FusedGemm", (X[0], floats(12, 7), floats(5, 7)),
         {"activation": "LeakyRelu", "activation_alpha": 0.2}, title="leaky"),
]  # fmt: skip

EINSUMS = [
    Case("Einsum", tuple(floats(*shape) for shape in shapes), {"equation": equation}, domain="",
         title=equation)
    for equation, *shapes in (
        ("bsd,de->bse", (2, 5, 12), (12, 7)),
        ("bsd,ed->bse", (2, 5, 12), (7, 12)),
        ("de,bsd->bse", (12, 7), (2, 5, 12)),
        ("bsd,dhk->bshk", (2, 5, 12), (12, 3, 4)),
        ("bsd,dhk->bhsk", (2, 5, 12), (12, 3, 4)),
        ("bshk,hkd->bsd", (2, 5, 3, 4), (3, 4, 7)),
        ("bhqd,bhkd->bhqk", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4)),
        ("bhqk,bkhd->bqhd", (2, 3, 5, 6), (2, 6, 3, 4)),
        ("...qd,...kd->...qk", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("... d, d e -> ... e", (2, 5, 12), (12, 7)),
        ("i,j->ij", (5,), (4,)),
        ("bi,bi->bi", (2, 5), (2, 5)),
        ("bij,bj->bi", (2, 5, 4), (2, 4)),
        ("bi,bi->b", (2, 5), (2, 5)),
        ("i,i->", (5,), (5,)),
        ("bsd->bds", (2, 5, 12)),
        ("bsd->b", (2, 5, 12)),
        ("bsd,de,ef->bsf", (2, 5, 12), (12, 7), (7, 4)),
        ("bsd,df->bs", (2, 5, 12), (12, 4)),
        ("ij,jk", (3, 4), (4, 5)),
        ("ba", (3, 4)),
    )
]  # fmt: skip

IDS = RNG.integers(0, 23, (2, 5)).astype(np.int32)
TABLES = (floats(23, 12), floats(9, 12), floats(2, 12), ROW, floats(12))
KEPT = ints([1, 1, 1, 1, 0], [1, 1, 1, 1, 1])
EMBEDDINGS = [
    Case("EmbedLayerNormalization", (IDS, IDS % 2, *TABLES, KEPT), {"epsilon": 1e-5}, 2),
    Case("EmbedLayerNormalization", (IDS, IDS % 2, *TABLES), {}, 3, title="sum"),
    Case("EmbedLayerNormalization", (IDS, None, *TABLES[:2], None, *TABLES[3:]), {}, 2,
         title="no segments"),
    Case("EmbedLayerNormalization", (IDS, IDS % 2, *TABLES, KEPT, ints([3, 1, 4, 1, 5])), {}, 2,
         title="positions"),
]  # fmt: skip


def int8_table(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def levels(*tables: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """Scales, then zero points, of int8 tables; none where there is no table."""
    scales = [None if t is None else np.float32(0.01 + 0.003 * i) for i, t in enumerate(tables)]
    zeros = [None if t is None else t.dtype.type(3 * i - 5) for i, t in enumerate(tables)]
    return tuple(x if x is None else np.asarray(x) for x in (*scales, *zeros))


INT8_TABLES = (int8_table(23, 12), int8_table(9, 12), int8_table(2, 12), int8_table(12),
               int8_table(12))  # fmt: skip
UINT8_TABLES = tuple((t.astype(np.int16) + 128).astype(np.uint8) for t in INT8_TABLES)
NO_SEGMENTS = (*INT8_TABLES[:2], None, *INT8_TABLES[3:])
QUANTIZED_EMBEDDINGS = [
    Case("QEmbedLayerNormalization", (IDS, IDS % 2, *INT8_TABLES, KEPT, *levels(*INT8_TABLES)),
         {"epsilon": 1e-5}, 2),
    Case("QEmbedLayerNormalization", (IDS, IDS % 2, *UINT8_TABLES, None, *levels(*INT8_TABLES)[:5],
                                      *(np.array(120 + i, np.uint8) for i in range(5))), {}, 2,
         title="unsigned, no mask"),
    Case("QEmbedLayerNormalization", (IDS, None, *NO_SEGMENTS, KEPT, *levels(*NO_SEGMENTS)), {}, 2,
         title="no segments"),
]  # fmt: skip

HEADS = {"num_heads": 3}
WEIGHTS = (floats(12, 36), floats(36))
PAST = floats(2, 2, 3, 4, 4)  # keys and values, batch, heads, length, head_dim
LENGTHS = ints(3, 5)
ENDS_AND_BEGINS = ints(3, 5, 1, 0)
MASK_2D = KEPT
MASK_3D = np.tril(np.ones((2, 5, 5), np.int32))
MASK_PAST = np.concatenate([np.ones((2, 4), np.int32), KEPT], axis=1)
BIAS_4D = floats(1, 3, 5, 5)
ATTENTIONS = [
    Case("Attention", (X, *WEIGHTS), HEADS),
    Case("Attention", (X, *WEIGHTS), {**HEADS, "unidirectional": 1, "scale": 0.3}, title="causal"),
    Case("Attention", (X, *WEIGHTS, LENGTHS), HEADS, title="lengths"),
    Case("Attention", (X, *WEIGHTS, ENDS_AND_BEGINS), HEADS, title="ends and begins"),
    Case("Attention", (X, *WEIGHTS, MASK_2D), HEADS, title="mask of tokens"),
    Case("Attention", (X, *WEIGHTS, MASK_2D), {**HEADS, "unidirectional": 1}, title="both masks"),
    Case("Attention", (X, *WEIGHTS, MASK_3D), HEADS, title="mask of pairs"),
    Case("Attention", (X, *WEIGHTS, None, PAST), {**HEADS, "unidirectional": 1}, 2, title="past"),
    Case("Attention", (X, *WEIGHTS, MASK_PAST, PAST), {**HEADS, "unidirectional": 1}, 2,
         title="past and mask"),
    Case("Attention", (X, *WEIGHTS, None, None, BIAS_4D), HEADS, title="bias of scores"),
    Case("Attention", (X, floats(12, 30), floats(30)),
         {**HEADS, "qkv_hidden_sizes": [12, 12, 6]}, title="narrow values"),
]  # fmt: skip

Q, K, V = floats(2, 5, 12), floats(2, 7, 12), floats(2, 7, 12)
QKV_BIAS = floats(36)
PADDED = ints([1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1])
MULTI_HEAD = [
    Case("MultiHeadAttention", (Q, K, V), HEADS),
    Case("MultiHeadAttention", (Q, K, floats(2, 7, 15), floats(39)), HEADS, title="wide values"),
    Case("MultiHeadAttention", (Q, K, V, QKV_BIAS), HEADS, title="bias"),
    Case("MultiHeadAttention", (Q, K, V, None, PADDED), {**HEADS, "scale": 0.2}, title="padding"),
    Case("MultiHeadAttention", (Q, K, V, None, ints(5, 7)), HEADS, title="lengths"),
    Case("MultiHeadAttention", (Q, K, V, None, None, floats(1, 3, 5, 7)), HEADS,
         title="bias of scores"),
    Case("MultiHeadAttention", (Q, K, V, None, np.ones((2, 5, 7), np.int32)), HEADS,
         title="mask of pairs"),
    Case("MultiHeadAttention", (X, X, X), {**HEADS, "unidirectional": 1}, title="causal"),
    Case("MultiHeadAttention", (Q, floats(2, 3, 7, 4), floats(2, 3, 7, 4)), HEADS,
         title="keys by head"),
    Case("MultiHeadAttention", (X, X, X, QKV_BIAS, None, None, PAST[0], PAST[1]),
         {**HEADS, "unidirectional": 1}, 3, title="past"),
    Case("MultiHeadAttention", (X, X, X, None, MASK_PAST, None, PAST[0], PAST[1]), HEADS, 3,
         title="past and padding"),
]  # fmt: skip

QUANTIZED_X = RNG.integers(0, 255, (2, 5, 12)).astype(np.uint8)
INT8_WEIGHT = RNG.integers(-127, 127, (12, 36)).astype(np.int8)
SCALE = np.array(0.02, np.float32)
ZERO = np.array(117, np.uint8)
ROUNDED = [
    Case("DynamicQuantizeMatMul", (X, INT8_WEIGHT, SCALE, np.array(3, np.int8), floats(36))),
    Case("DynamicQuantizeMatMul", (X, INT8_WEIGHT, np.abs(floats(36)) / 99), title="columns"),
    Case("MatMulIntegerToFloat", (QUANTIZED_X, INT8_WEIGHT, SCALE, SCALE / 2, ZERO, None,
                                  floats(36))),
    Case("MatMulIntegerToFloat", (QUANTIZED_X, INT8_WEIGHT, SCALE, np.abs(floats(36)) / 99, ZERO,
                                  np.zeros(36, np.int8)), title="columns"),
]  # fmt: skip
QUANTIZED = [
    *ROUNDED,
    Case("QAttention",
         (QUANTIZED_X, INT8_WEIGHT, floats(36), SCALE, SCALE / 2, LENGTHS, ZERO,
          np.array(0, np.int8)), HEADS),
    Case("QAttention",
         (QUANTIZED_X, INT8_WEIGHT, floats(36), SCALE, np.abs(floats(36)) / 99, None, ZERO,
          np.zeros(36, np.int8), PAST), {**HEADS, "unidirectional": 1}, 2, title="columns, past"),
]  # fmt: skip

Q2 = QUANTIZED_X[0]
COLUMNS = (np.abs(floats(36)) / 99, np.zeros(36, np.int8))
RESULT = (np.array(0.7, np.float32), np.array(100, np.uint8))
OTHER = (QUANTIZED_X[::-1], np.array(0.03, np.float32), np.array(90, np.uint8))
BIAS = RNG.integers(-9000, 9000, 36).astype(np.int32)
CHANNELS = RNG.integers(0, 256, (2, 36, 7), dtype=np.uint8)
TAPS = RNG.integers(-127, 128, (36, 1, 3), dtype=np.int8)
INTEGERS = [
    Case("QLinearMatMul", (QUANTIZED_X, SCALE, ZERO, INT8_WEIGHT, SCALE, np.array(3, np.int8),
                           *RESULT), domain="", opset=21),
    Case("QLinearMatMul", (QUANTIZED_X, SCALE, ZERO, INT8_WEIGHT, *COLUMNS, *RESULT), domain="",
         opset=21, title="columns"),
    Case("QGemm", (Q2, SCALE, ZERO, INT8_WEIGHT, SCALE, np.array(0, np.int8), BIAS, *RESULT)),
    Case("QGemm", (Q2, SCALE, ZERO, INT8_WEIGHT.T.copy(), *COLUMNS, BIAS), {"transB": 1},
         title="columns, float result"),
    Case("QLinearConv", (CHANNELS, SCALE, ZERO, TAPS, SCALE, np.array(0, np.int8), *RESULT),
         {"group": 36, "pads": [2, 0]}, domain="", opset=21),
    Case("QLinearConv", (CHANNELS, SCALE, ZERO, TAPS, *COLUMNS, *RESULT, BIAS),
         {"group": 36, "pads": [2, 2], "kernel_shape": [3]}, domain="", opset=21,
         title="a scale for each channel"),
    *(Case(op, (QUANTIZED_X, SCALE, ZERO, *OTHER, *RESULT)) for op in ("QLinearAdd", "QLinearMul")),
    Case("QLinearSigmoid", (QUANTIZED_X, SCALE, ZERO, SCALE / 4, np.array(0, np.uint8))),
    Case("QLinearLeakyRelu", (QUANTIZED_X, SCALE, ZERO, SCALE, ZERO), {"alpha": 0.2}),
    Case("QLinearSoftmax", (QUANTIZED_X, SCALE, ZERO, np.array(1 / 255, np.float32),
                            np.array(0, np.uint8)), {"axis": -1, "opset": 13}),
    Case("QLinearSoftmax", (QUANTIZED_X, SCALE, ZERO, np.array(0.0043, np.float32),
                            np.array(0, np.uint8)), {"axis": 1, "opset": 13},
         title="another axis, a scale that is no whole part"),
    Case("QLinearSoftmax", (Q2, SCALE, ZERO, np.array(0.0043, np.float32),
                            np.array(3, np.uint8)), {"opset": 11}, title="old axis"),
    Case("QLinearConcat", (*RESULT, QUANTIZED_X, SCALE, ZERO, *OTHER), {"axis": 1}),
    Case("QLinearWhere", (QUANTIZED_X > 99, QUANTIZED_X, SCALE, ZERO, *OTHER, *RESULT)),
]  # fmt: skip

Q4, K4, V4 = floats(2, 6, 5, 8), floats(2, 3, 7, 8), floats(2, 3, 7, 8)
Q3, K3, V3 = floats(2, 5, 48), floats(2, 7, 24), floats(2, 7, 24)
FLAT = {"q_num_heads": 6, "kv_num_heads": 3}
SEEN = RNG.random((5, 7)) < 0.7
SEEN[:, 0] = True
PAST_KEY, PAST_VALUE = floats(2, 3, 4, 8), floats(2, 3, 4, 8)
ONNX = {"domain": "", "opset": 23}
ONNX_ATTENTIONS = [
    Case("Attention", (Q4, Q4, Q4), title="onnx", **ONNX),
    Case("Attention", (Q4, K4, V4), title="onnx groups", **ONNX),
    Case("Attention", (Q3, K3, V3), {**FLAT, "scale": 0.3}, title="onnx flat", **ONNX),
    Case("Attention", (Q4, K4, V4, SEEN), title="onnx boolean mask", **ONNX),
    Case("Attention", (Q4, K4, V4, floats(2, 6, 5, 7)), title="onnx float mask", **ONNX),
    Case("Attention", (Q3, K3, V3, floats(1, 5, 7)), FLAT, title="onnx mask of rank 3", **ONNX),
    Case("Attention", (Q4, Q4, Q4), {"is_causal": 1}, title="onnx causal", **ONNX),
    Case("Attention", (Q4, K4, V4), {"softcap": 1.5}, title="onnx softcap", **ONNX),
    Case("Attention", (Q4, K4, V4, floats(5, 7)), {"softcap": 1.5},
         title="onnx softcap and mask", **ONNX),
    Case("Attention", (Q4, Q4[:, :3], V4[:, :, :5], None, PAST_KEY, PAST_VALUE), {}, 3,
         title="onnx past", **ONNX),
    Case("Attention", (Q4, Q4[:, :3], V4[:, :, :5], None, PAST_KEY, PAST_VALUE),
         {"is_causal": 1}, 3, title="onnx past and causal", **ONNX),
    Case("Attention", (Q4, K4, V4, None, None, None, ints(3, 7, dtype=np.int64)), domain="",
         opset=24, title="onnx valid keys"),
    Case("Attention", (Q4, K4, floats(2, 3, 7, 6)), title="onnx narrow values", **ONNX),
    Case("Attention", (Q4, K4, V4), {"is_causal": 1}, title="onnx causal, more keys", **ONNX),
    Case("Attention", (Q4, K4, V4, None, None, None, ints(5, 7, dtype=np.int64)),
         {"is_causal": 1}, domain="", opset=24, title="onnx valid keys and causal"),
    Case("Attention", (Q4, Q4, Q4), {"is_causal": 1, "left_window_size": 2}, domain="", opset=25,
         title="onnx window"),
    Case("Attention", (Q4, K4, V4), {"left_window_size": 1, "right_window_size": 2}, domain="",
         opset=25, title="onnx window to both sides"),
    Case("Attention", (Q4, Q4[:, :3], V4[:, :, :5], None, PAST_KEY, PAST_VALUE),
         {"left_window_size": 3, "right_window_size": 0}, 3, domain="", opset=25,
         title="onnx window over a past"),
    Case("Attention", (Q4, Q4, Q4), {"is_causal": 1}, domain="", opset=28, title="onnx newest"),
]  # fmt: skip

ANGLES = floats(11, 4)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
PLACES = ints([0, 1, 2, 3, 4], [6, 5, 4, 10, 0], dtype=np.int64)
ROTARIES = [
    Case("RotaryEmbedding", (Q4, COS, SIN, PLACES), title="by head", **ONNX),
    Case("RotaryEmbedding", (Q4, COS, SIN, PLACES), {"interleaved": 1}, title="pairs", **ONNX),
    Case("RotaryEmbedding", (Q3, COS, SIN, PLACES), {"num_heads": 6}, title="flat", **ONNX),
    Case("RotaryEmbedding", (Q4, COS[PLACES], SIN[PLACES]), title="rows", **ONNX),
    Case("RotaryEmbedding", (Q4, COS[:, :3], SIN[:, :3], PLACES), {"rotary_embedding_dim": 6},
         title="part", **ONNX),
    Case("RotaryEmbedding", (Q3, COS[:, :2], SIN[:, :2], PLACES),
         {"rotary_embedding_dim": 4, "num_heads": 6, "interleaved": 1}, title="flat part", **ONNX),
]  # fmt: skip

# As long as what is written into it: all that there is without a past.
CACHES = [
    Case("TensorScatter", (floats(1, 2, 5, 4), floats(1, 2, 5, 4), ints(0, dtype=np.int64)),
         {"axis": 2}, domain="", opset=24),
]  # fmt: skip

CASES = [
    *POINTWISE, *PRODUCTS, *EINSUMS, *EMBEDDINGS, *QUANTIZED_EMBEDDINGS, *ATTENTIONS, *MULTI_HEAD,
    *QUANTIZED, *INTEGERS, *ONNX_ATTENTIONS, *ROTARIES, *CACHES,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_written_out_computes_what_onnxruntime_computes(case, tmp_path):
    model = model_of(case)
    want = expected(model)
    got = written_out(model, tmp_path)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.dtype.kind in "iu":  # a last bit of a float may decide a rounding
            assert np.abs(a.astype(np.int64) - b).sum() <= 1
        else:
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_every_expansion_has_a_case():
    covered = {
        id(find_expansion(c.domain, c.op, c.opset if not c.domain else 1)) for c in CASES
    } | {id(find_expansion(MICROSOFT, "DecoderMaskedMultiHeadAttention", 1))}
    missing = [f"{e.domain}.{e.op_type} from {e.since}" for e in registered_expansions()
               if id(e) not in covered]  # fmt: skip
    assert missing == []


def same_as(case: Case, other: Case, folder: Path) -> None:
    """``case``, which onnxruntime's CPU kernels do not take, gives what they give for ``other``."""
    (want,) = expected(model_of(other))
    (got,) = written_out(model_of(case), folder)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_an_attention_may_have_no_bias(tmp_path):
    weights = floats(12, 36)
    zeros = np.zeros(36, np.float32)
    same_as(Case("Attention", (X, weights), HEADS), Case("Attention", (X, weights, zeros), HEADS),
            tmp_path)  # fmt: skip


def test_packed_projections_are_taken_apart(tmp_path):
    packed = floats(2, 5, 3, 3, 4)
    parts = [packed[:, :, :, i].reshape(2, 5, 12) for i in range(3)]
    same_as(Case("MultiHeadAttention", (packed,), HEADS),
            Case("MultiHeadAttention", tuple(parts), HEADS), tmp_path)  # fmt: skip


@pytest.mark.parametrize("bias", [None, QKV_BIAS])
def test_packed_keys_and_values_are_taken_apart(bias, tmp_path):
    packed = floats(2, 7, 3, 2, 4)
    k, v = (packed[:, :, :, i].reshape(2, 7, 12) for i in range(2))
    same_as(Case("MultiHeadAttention", (Q, packed, None, bias), HEADS),
            Case("MultiHeadAttention", (Q, k, v, bias), HEADS), tmp_path)  # fmt: skip


@pytest.mark.parametrize("bias", [None, QKV_BIAS])
def test_a_decoding_attention_reads_the_filled_part_of_its_buffer(bias, tmp_path):
    """The outputs for the cache differ: it is appended to here, not written into."""
    filled = 3
    q, k, v = (floats(2, 1, 12) for _ in range(3))
    keys, values = floats(2, 3, 8, 4), floats(2, 3, 8, 4)
    mask = ints([0, 1, 1, 1], [1, 1, 1, 1])
    case = Case(
        "DecoderMaskedMultiHeadAttention",
        (q, k, v, mask, None, keys, values, ints(filled), None, None, bias),
        {**HEADS, "past_present_share_buffer": 1, "scale": 0.4}, 3,
    )  # fmt: skip
    model = model_of(case)
    want, *_ = expected(model)
    got, new_keys, new_values = written_out(model, tmp_path)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(new_keys[:, :, :filled], keys[:, :, :filled])
    assert new_keys.shape == new_values.shape == (2, 3, filled + 1, 4)


REFUSED = [
    (Case("Attention", (X, *WEIGHTS, ints(*range(8))), HEADS), "a mask of shape [8]"),
    (Case("Attention", (X, *WEIGHTS), {**HEADS, "do_rotary": 1}), "do_rotary"),
    (Case("MultiHeadAttention", (X,), HEADS), "an attention without keys"),
    (Case("FusedGemm", (X[0], floats(12, 7)), {"activation": "Mystery"}), "activation 'Mystery'"),
    (
        Case("QLinearSoftmax", (QUANTIZED_X, SCALE, ZERO, SCALE, ZERO), {"opset": 11}),
        "a softmax over all axes from 1 on",
    ),
    (Case("Attention", (Q4, Q4, Q4), {}, 4, **ONNX), "output 'y3' is not supported"),
    (Case("Einsum", (floats(4, 4),), {"equation": "ii->i"}, domain=""), "the diagonal 'ii'"),
    (
        Case("Einsum", (floats(2, 5), floats(1, 5)), {"equation": "bi,bi->bi"}, domain=""),
        "an axis of 'bi,bi->bi' that is 2 and 1 long",
    ),
]
CONTRADICTORY = [
    (Case("Einsum", (floats(4, 4),), {"equation": "ij,jk->ik"}, domain=""), "2 terms for 1 inputs"),
    (Case("Einsum", (floats(4, 4),), {"equation": "ijk->i"}, domain=""), "does not fit [4, 4]"),
    (Case("Einsum", (floats(4, 4),), {"equation": "ij->k"}, domain=""), "labels that no term has"),
    (Case("Attention", (X, *WEIGHTS), {"num_heads": 5}), "is not 5 heads"),
    (Case("Attention", (X, *WEIGHTS), {**HEADS, "qkv_hidden_sizes": [12, 12, 6]}), "36 features"),
    (Case("Attention", (X, *WEIGHTS), {**HEADS, "scale": float("inf")}), "'scale' is inf"),
    (Case("Attention", (Q4, K4[:, :2], V4[:, :, :, :5]), {}, **ONNX), "keys of shape [2, 2, 7, 8]"),
    (Case("Attention", (Q4, Q4[:, :4], Q4[:, :4]), {}, **ONNX), "6 query heads cannot share 4"),
    (Case("Attention", (Q3, K3, V3), {}, **ONNX), "is not 0 heads"),
    (Case("RotaryEmbedding", (Q3, COS, SIN, PLACES), {}, **ONNX), "48 features are not 0 heads"),
    (Case("EmbedLayerNormalization", (IDS, None, None, *TABLES[1:]), {}, 2), "input is absent"),
    (
        Case("EmbedLayerNormalization", (IDS, IDS, *TABLES[:2], None, *TABLES[3:]), {}, 2),
        "segment ids without a segment embedding",
    ),
    (
        Case(
            "QEmbedLayerNormalization",
            (IDS, None, *NO_SEGMENTS[:4], None, KEPT, *levels(*TABLES)),
            {},
            2,
        ),
        "input is absent",
    ),
    (
        Case("QEmbedLayerNormalization", (IDS, IDS, *NO_SEGMENTS, KEPT, *levels(*TABLES)), {}, 2),
        "segment ids without a segment embedding",
    ),
]


@pytest.mark.parametrize(("case", "said"), REFUSED, ids=str)
def test_a_variant_that_is_not_written_out_is_refused_by_name(case, said, tmp_path):
    with pytest.raises(UnsupportedOpError) as caught:
        written_out(model_of(case), tmp_path)
    assert said in str(caught.value) and f"{case.op} node 'op'" in str(caught.value)


@pytest.mark.parametrize(("case", "said"), CONTRADICTORY, ids=str)
def test_inputs_that_contradict_each_other_name_the_node(case, said, tmp_path):
    with pytest.raises(InvalidModelError) as caught:
        written_out(model_of(case), tmp_path)
    assert said in str(caught.value) and "node 'op" in str(caught.value)
