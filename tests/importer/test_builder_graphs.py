"""Graphs of whole-layer operators, as onnxruntime-genai's model builder writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import GraphBuilder, run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.test_import_spellings import calls_of, op_names

MICROSOFT = "com.microsoft"
BLOCK = 32
TOLERANCE = 1e-4  # of the logits' range
POSITIONS = 80  # rows of the rotary tables
CONTEXT = 64
TOKENS = 45


@dataclass(frozen=True)
class Built:
    """A decoder in the builder's operators; sizes are no multiples of a block where they may be."""

    vocab: int = 53
    hidden: int = 40
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 37
    layers: int = 2
    packed: bool = True
    rotary: str = "inside"  # the attention operator, "outside", "heads" (outside, by head) or ""
    rotated: int = 16  # features of a head
    interleaved: bool = False
    bias: bool = False
    skip_bias: bool = False
    skip: str = "SkipSimplifiedLayerNormalization"
    accuracy_level: int | None = None  # of int4 products; None for float ones
    shared_embedding: bool = False
    attention: tuple[tuple[str, object], ...] = ()  # further attributes of the attention
    attention_inputs: tuple[str, ...] = ()  # further inputs, from position_ids on; see _further
    spelled_norms: bool = False  # norms of each head, before the attention
    layouts: tuple[np.ndarray, ...] = ()  # of a SparseAttention instead, bool (blocks, blocks)
    seqlens: int | None = None  # a constant instead of what follows from the mask


def write(built: Built) -> onnx.ModelProto:
    """input_ids, attention_mask, (position_ids,) past_key_values.* -> logits."""
    b = GraphBuilder(np.random.default_rng(0))
    lengths = _lengths(b, built)
    x = _embedding(b, built)
    norm = b.op("SimplifiedLayerNormalization", x, b.near(1, built.hidden), epsilon=1e-5, axis=-1)
    for layer in range(built.layers):
        y = _attention(b, built, norm, lengths, layer)
        norm, x = _skip_norm(b, built, x, y, last=False)
        gate = _linear(b, built, norm, built.hidden, built.ffn)
        up = _linear(b, built, norm, built.hidden, built.ffn)
        y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        y = _linear(b, built, y, built.ffn, built.hidden)
        norm, x = _skip_norm(b, built, x, y, last=layer == built.layers - 1)
    _linear(b, built, norm, built.hidden, built.vocab, name="head" if built.accuracy_level else "")
    b.nodes[-1].output[0] = "logits"
    past = (1, built.kv_heads, "past", built.head_dim)
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        *(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, past)
            for layer in range(built.layers)
            for name in _past_names(layer)
        ),
    ]
    if built.rotary in ("outside", "heads"):
        dims = ["batch", "seq"]
        inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, dims))
    dims = ["batch", "seq", built.vocab]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, dims)]
    for name in [n for layer in range(built.layers) for n in _present_names(layer)]:
        if built.layouts:
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, past))
    return b.model(inputs, outputs)


def _past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def _present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def _lengths(b: GraphBuilder, built: Built) -> tuple[str, str]:
    """seqlens_k and total_sequence_length from the mask."""
    if built.seqlens is not None:
        seqlens = b.constant([built.seqlens], np.int32)
    else:
        count = b.op("ReduceSum", "attention_mask", b.ints(1))
        seqlens = b.op("Cast", b.op("Sub", count, b.ints(1)), to=TensorProto.INT32)
    total = b.op("Gather", b.op("Shape", "attention_mask"), b.constant(1, np.int64), axis=0)
    return seqlens, b.op("Cast", total, to=TensorProto.INT32)


def _embedding(b: GraphBuilder, built: Built) -> str:
    if not built.shared_embedding:
        table = b.random.normal(size=(built.vocab, built.hidden))
        return b.op("Gather", b.constant(table, name="embedding"), "input_ids")
    weight, scales = _int4(b, built.hidden, built.vocab, "head")
    table = b.op("Reshape", weight, b.ints(built.vocab, built.hidden // 2))
    return b.op(
        "GatherBlockQuantized", table, "input_ids", scales,
        domain=MICROSOFT, bits=4, block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _int4(b: GraphBuilder, k: int, n: int, name: str) -> tuple[str, str]:
    """Weights (n, groups, 16) of packed nibbles and their scales, made once for each name."""
    weight, scales = f"{name}.weight_Q4", f"{name}.weight_scales"
    if not name or weight not in b.constants:
        groups = -(-k // BLOCK)
        bytes_ = b.random.integers(0, 256, (n, groups, BLOCK // 2))
        weight = b.constant(bytes_, np.uint8, weight if name else "")
        size = (0.5 + b.random.random((n, groups))) / (5 * np.sqrt(k))
        scales = b.constant(size, name=scales if name else "")
    return weight, scales


def _linear(b: GraphBuilder, built: Built, x: str, k: int, n: int, name: str = "") -> str:
    if built.accuracy_level is None:
        return b.op("MatMul", x, b.weight(k, n))
    return b.op(
        "MatMulNBits", x, *_int4(b, k, n, name), domain=MICROSOFT,
        K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=built.accuracy_level,
    )  # fmt: skip


def _projection(b: GraphBuilder, built: Built, x: str, n: int) -> str:
    y = _linear(b, built, x, built.hidden, n)
    return b.op("Add", y, b.near(0, n)) if built.bias else y


def _attention(b: GraphBuilder, built: Built, x: str, lengths: tuple[str, str], layer: int) -> str:
    width, kv_width = built.heads * built.head_dim, built.kv_heads * built.head_dim
    if built.packed:
        q, k, v = _projection(b, built, x, width + 2 * kv_width), "", ""
        if built.rotary in ("outside", "heads"):
            sizes = b.ints(width, kv_width, kv_width)
            q, k, v = b.ops("Split", q, sizes, outputs=3, axis=2)
    else:
        q, k, v = (_projection(b, built, x, n) for n in (width, kv_width, kv_width))
    cos = sin = ""
    if built.rotary:
        cos, sin = _tables(b, built)
    if built.rotary in ("outside", "heads"):
        q = _rotate(b, built, q, built.heads, cos, sin)
        k = _rotate(b, built, k, built.kv_heads, cos, sin)
        cos = sin = ""
    if built.spelled_norms:
        q, k = _norm_heads(b, built, q, built.heads), _norm_heads(b, built, k, built.kv_heads)
    if built.layouts:
        attention = _sparse_attention(b, built, (q, k, v), lengths, (cos, sin), layer)
        return _linear(b, built, attention, width, built.hidden)
    further = [_further(b, built, name) for name in built.attention_inputs]
    attention = b.op(
        "GroupQueryAttention", q, k, v, *_past_names(layer), *lengths, cos, sin, *further,
        outputs=3, domain=MICROSOFT, num_heads=built.heads, kv_num_heads=built.kv_heads,
        do_rotary=int(built.rotary == "inside"), rotary_interleaved=int(built.interleaved),
        **dict(built.attention),
    )  # fmt: skip
    return _linear(b, built, attention, width, built.hidden)


def _sparse_attention(
    b: GraphBuilder, built: Built, projections: tuple[str, str, str], lengths: tuple[str, str],
    tables: tuple[str, str], layer: int,
) -> str:  # fmt: skip
    most = max(int(layout.sum()) for layout in built.layouts)
    rows = [[0, *np.cumsum(layout.sum(axis=1))] for layout in built.layouts]
    columns = [np.nonzero(layout)[1] for layout in built.layouts]
    padded = [np.pad(c, (0, most - len(c)), constant_values=-1) for c in columns]
    seqlens, total = lengths
    count = b.op("Reshape", b.op("Add", seqlens, b.constant([1], np.int32)), b.ints(-1))
    y, *_ = b.ops(
        "SparseAttention", *projections, *_past_names(layer), b.constant(rows, np.int32),
        b.constant(padded, np.int32), total, count, *tables, outputs=3, domain=MICROSOFT,
        num_heads=built.heads, kv_num_heads=built.kv_heads, sparse_block_size=16,
        do_rotary=int(built.rotary == "inside"), rotary_interleaved=int(built.interleaved),
    )  # fmt: skip
    for index, name in enumerate(_present_names(layer)):
        b.nodes[-1].output[1 + index] = name
    return y


def _norm_heads(b: GraphBuilder, built: Built, x: str, heads: int) -> str:
    # As the builder has it: heads and tokens share an axis in between.
    x = b.op("Reshape", x, b.ints(0, -1, built.head_dim))
    gamma = b.near(1, built.head_dim)
    x = b.op("SimplifiedLayerNormalization", x, gamma, epsilon=1e-6, axis=-1)
    return b.op("Reshape", x, b.ints(0, -1, heads * built.head_dim))


def _further(b: GraphBuilder, built: Built, name: str) -> str:
    """An optional input of the attention; "" where it is only there to reach a later one."""
    if name == "head_sink":
        return b.near(0, built.heads)
    if name in ("q_norm_weight", "k_norm_weight"):
        return b.near(1, built.head_dim)
    return _distance_bias(b, built) if name == "attention_bias" else ""


def _distance_bias(b: GraphBuilder, built: Built) -> str:
    """(1, heads, length, length): the distance times a number of each head."""
    length = b.op("Squeeze", b.op("Shape", "input_ids", start=1, end=2))
    places = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    distance = b.op("Sub", places, b.op("Unsqueeze", places, b.ints(1)))
    slopes = b.constant(2.0 ** -np.arange(1, built.heads + 1)[None, :, None, None])
    return b.op("Mul", b.op("Cast", distance, to=TensorProto.FLOAT), slopes)


def _tables(b: GraphBuilder, built: Built) -> tuple[str, str]:
    half = built.rotated // 2
    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(half) / half)
    if "cos_cache" not in b.constants:
        b.constant(np.cos(angles), name="cos_cache")
        b.constant(np.sin(angles), name="sin_cache")
    return "cos_cache", "sin_cache"


def _rotate(b: GraphBuilder, built: Built, x: str, heads: int, cos: str, sin: str) -> str:
    partial = built.rotated != built.head_dim
    attrs = {"num_heads": heads, "rotary_embedding_dim": built.rotated} if partial else {}
    by_head = built.rotary == "heads"
    if by_head:
        x = b.op("Reshape", x, b.ints(0, 0, heads, built.head_dim))
        x = b.op("Transpose", x, perm=[0, 2, 1, 3])
    x = b.op(
        "RotaryEmbedding", x, "position_ids", cos, sin,
        domain=MICROSOFT, interleaved=int(built.interleaved), **attrs,
    )  # fmt: skip
    if by_head:
        x = b.op("Transpose", x, perm=[0, 2, 1, 3])
        x = b.op("Reshape", x, b.ints(0, 0, heads * built.head_dim))
    return x


def _skip_norm(b: GraphBuilder, built: Built, x: str, y: str, *, last: bool) -> tuple[str, str]:
    """The norm of the sum, and the sum, which is no output of the last one."""
    constants = [b.near(1, built.hidden)]
    if built.skip == "SkipLayerNormalization":
        constants.append(b.near(0, built.hidden))
    if built.skip_bias:
        constants.append(b.near(0, built.hidden))
    norm, *_, total = b.ops(built.skip, x, y, *constants, outputs=4, domain=MICROSOFT, epsilon=1e-5)
    kept = 1 if last else 4
    del b.nodes[-1].output[kept:]
    for index in range(1, kept - 1):
        b.nodes[-1].output[index] = ""
    return norm, total


def import_checked(built: Built, folder: Path, positions: int = TOKENS) -> CanonicalModel:
    """Import the model and compare its first positions with onnxruntime on random tokens."""
    path = save(write(built), folder)
    model = import_onnx(path, context=CONTEXT)
    tokens = np.random.default_rng(1).integers(0, built.vocab, TOKENS)
    want = run_onnxruntime(path, tokens)
    difference = np.abs(evaluate(model, tokens) - want)[:positions]
    assert difference.max() <= TOLERANCE * np.ptp(want)
    return model


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rotary", ["inside", "outside", "heads", ""])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_whole_layer_operators_give_the_ops_of_other_exports(packed, rotary, kv_heads, tmp_path):
    built = Built(packed=packed, rotary=rotary, kv_heads=kv_heads)
    model = import_checked(built, tmp_path)
    spelled = Tiny(
        hidden=40, heads=4, kv_heads=kv_heads, head_dim=16, layers=2,
        rope="rotate_half" if rotary else "",
    )  # fmt: skip
    other = import_onnx(save(build(spelled), tmp_path, "spelled.onnx"), context=CONTEXT)
    assert op_names(model) == op_names(other)
    assert model.kv == other.kv and model.family == other.family
    (scale,) = {float(c.attrs["scale"]) for c in calls_of(model, "slm.attention")}
    assert scale == pytest.approx(16**-0.5)


@pytest.mark.parametrize("rotary", ["inside", "outside", "heads"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotated", [16, 32])
def test_rotary_tables_are_the_file_s_own_rows(rotary, interleaved, rotated, tmp_path):
    built = Built(rotary=rotary, interleaved=interleaved, head_dim=32, rotated=rotated)
    model = import_checked(built, tmp_path)
    angles = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(rotated // 2) / (rotated // 2))
    assert np.array_equal(model.params["rope.cos"], np.cos(angles).astype(np.float32))
    assert np.array_equal(model.params["rope.sin"], np.sin(angles).astype(np.float32))
    assert not model.params["rope.cos"].flags.owndata
    for call in calls_of(model, "slm.rope"):
        assert bool(call.attrs["interleaved"]) == interleaved


def test_int4_products_of_any_width_follow_their_accuracy_level(tmp_path):
    model = import_checked(Built(accuracy_level=1), tmp_path)
    assert {str(c.attrs["activation"]) for c in calls_of(model, "slm.linear")} == {"f32"}
    rounded = Built(accuracy_level=4, layers=1)
    # Later positions meet roundings of activations that fall on the other side.
    model = import_checked(rounded, tmp_path, positions=2)
    assert {str(c.attrs["activation"]) for c in calls_of(model, "slm.linear")} == {"block"}


def test_an_int4_embedding_shares_its_memory_with_the_head(tmp_path):
    built = Built(hidden=64, accuracy_level=1, shared_embedding=True)
    model = import_checked(built, tmp_path)
    (embedding,) = calls_of(model, "slm.embedding")
    head = calls_of(model, "slm.linear")[-1]
    assert embedding.args[1].same_as(head.args[1]) and embedding.args[2].same_as(head.args[2])


@pytest.mark.parametrize("packed", [True, False])
def test_biases_of_projections_belong_to_them(packed, tmp_path):
    model = import_checked(Built(packed=packed, bias=True), tmp_path)
    with_bias = [c for c in calls_of(model, "slm.linear") if "bias" in str(c.attrs["operands"])]
    assert len(with_bias) == 6
    assert model.family == "qwen2"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("skip", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_sum_with_its_norm_becomes_an_addition_and_a_norm(skip, bias, tmp_path):
    model = import_checked(Built(skip=skip, skip_bias=bias), tmp_path)
    norms = op_names(model).count("slm.layer_norm")
    assert norms == (4 if skip == "SkipLayerNormalization" else 0)
    assert op_names(model).count("relax.add") == (8 if bias else 4)


def test_the_rotary_tables_bound_the_context(tmp_path):
    path = save(write(Built()), tmp_path)
    assert import_onnx(path).context == POSITIONS
    with pytest.raises(UnsupportedOpError, match=f"the model's own tables have {POSITIONS}"):
        import_onnx(path, context=POSITIONS + 1)


@pytest.mark.parametrize(
    ("attributes", "inputs", "said"),
    [
        ({"k_quant_type": "PER_TENSOR"}, (), "a quantized cache"),
    ],
)
def test_variants_that_cannot_be_compiled_are_refused_by_name(attributes, inputs, said, tmp_path):
    built = Built(attention=tuple(attributes.items()), attention_inputs=inputs)
    path = save(write(built), tmp_path)
    with pytest.raises(UnsupportedOpError, match=said) as caught:
        import_onnx(path, context=CONTEXT)
    assert "GroupQueryAttention node" in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "inputs", "places"),
    [
        ({}, ("position_ids", "attention_bias", "head_sink"), 2),
        ({"softcap": 2.0, "local_window_size": 9}, ("position_ids", "", "head_sink"), 1),
        ({"smooth_softmax": 1}, (), 1),
    ],
)
def test_a_softmax_counts_a_score_of_no_key(attributes, inputs, places, tmp_path):
    built = Built(attention=tuple(attributes.items()), attention_inputs=inputs)
    for call in calls_of(import_checked(built, tmp_path), "slm.attention"):
        assert str(call.attrs["operands"]).split(",")[places - 1] == "sinks"


@pytest.mark.parametrize(("size", "window"), [(1, 1), (13, 13), (CONTEXT - 1, 63), (CONTEXT, 0)])
def test_a_window_hides_what_is_further_back(size, window, tmp_path):
    model = import_checked(Built(attention=(("local_window_size", size),)), tmp_path)
    for call in calls_of(model, "slm.attention"):
        assert int(call.attrs["window"]) == window


def test_a_cache_of_a_window_s_size_is_the_compiler_s_matter(tmp_path):
    attributes = (("local_window_size", 13), ("sliding_window_cache", 1))
    plain = import_checked(Built(attention=attributes[:1]), tmp_path)
    model = import_onnx(save(write(Built(attention=attributes)), tmp_path), context=CONTEXT)
    tokens = np.arange(TOKENS)
    assert np.array_equal(evaluate(model, tokens), evaluate(plain, tokens))


def test_capped_scores_keep_their_cap(tmp_path):
    model = import_checked(Built(attention=(("softcap", 1.5),)), tmp_path)
    for call in calls_of(model, "slm.attention"):
        assert float(call.attrs["softcap"]) == 1.5


@pytest.mark.parametrize("window", [-1, 20])
def test_a_bias_by_distance_has_a_row_for_each_head(window, tmp_path):
    built = Built(
        attention=(("local_window_size", window), ("softcap", 2.0)),
        attention_inputs=("position_ids", "attention_bias"),
    )
    model = import_checked(built, tmp_path)
    (bias,) = {c.args[-1].name for c in calls_of(model, "slm.attention")}
    want = 2.0 ** -np.arange(1, 5)[:, None] * np.arange(1 - CONTEXT, 1)
    visible = slice(0 if window < 0 else CONTEXT - window, None)
    assert np.allclose(model.params[bias][:, visible], want[:, visible])


def test_norms_of_heads_inside_the_attention_are_those_before_it(tmp_path):
    """onnxruntime's CPU kernel does not take them: it runs the model with norms beside it."""
    inputs = ("position_ids", *("",) * 4, "q_norm_weight", "k_norm_weight")
    built = Built(packed=False, attention_inputs=inputs)
    model = import_onnx(save(write(built), tmp_path), context=CONTEXT)
    spelled = replace(built, attention_inputs=(), spelled_norms=True)
    path = save(write(spelled), tmp_path, "spelled.onnx")
    tokens = np.arange(TOKENS)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)
    other = import_onnx(path, context=CONTEXT)
    assert op_names(model) == op_names(other)
    assert [int(c.attrs["groups"]) for c in calls_of(model, "slm.rms_norm")].count(4) == 2


def test_a_past_that_does_not_follow_from_the_mask_is_refused(tmp_path):
    path = save(write(Built(seqlens=3)), tmp_path)
    with pytest.raises(UnsupportedOpError, match="seqlens_k must follow from the attention mask"):
        import_onnx(path, context=CONTEXT)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_heads": 3}, "4 query heads cannot share 3 key and value heads"),
        ({"attention": (("scale", float("nan")),)}, "attribute 'scale' is nan"),
        ({"rotated": 18}, "tables that rotate 18 features of heads of 16"),
        ({"attention": (("no_such", 1),)}, "attribute 'no_such' is not one of the operator"),
    ],
)
def test_contradictions_are_errors_that_name_the_node(change, said, tmp_path):
    path = save(write(replace(Built(), **change)), tmp_path)
    with pytest.raises(InvalidModelError, match=said) as caught:
        import_onnx(path, context=CONTEXT)
    assert "GroupQueryAttention node" in str(caught.value)


@pytest.mark.parametrize("sizes", [(2, -16), (1 << 20, 1 << 20)])
def test_a_cache_of_impossible_size_is_refused(sizes, tmp_path):
    model = write(Built(layers=1))
    for port in model.graph.input:
        if port.name.startswith("past"):
            _, heads, _, head_dim = port.type.tensor_type.shape.dim
            heads.dim_value, head_dim.dim_value = sizes
    with pytest.raises(InvalidModelError, match=r"'past_key_values.0.key' has impossible"):
        import_onnx(save(model, tmp_path), context=CONTEXT)
