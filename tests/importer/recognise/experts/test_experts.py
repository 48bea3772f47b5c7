"""Mixtures of experts and causal convolutions in the forms that exporters write."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from tvm import relax

import slmtvm
from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.experts import Routing
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.schedules.linear.packed_rows import pack_rows
from tests.importer.graph_builder import GraphBuilder, insert_after, run_onnxruntime, save
from tests.importer.graphs import Tiny, build

EXPERTS, TOP_K, FFN, LARGE_FFN = 5, 2, 37, 8192
TOKENS = np.random.default_rng(3).integers(0, Tiny().vocab, 19)
MICROSOFT = "com.microsoft"


def router(b: GraphBuilder, x: str, hidden: int) -> str:
    """Logits (rows, experts) of x (batch, length, hidden)."""
    rows = b.op("Reshape", x, b.ints(-1, hidden))
    return b.op("MatMul", rows, b.weight(hidden, EXPERTS))


def chosen(b: GraphBuilder, logits: str) -> tuple[str, str]:
    """Weights and experts of each row, as Mixtral has them."""
    scores = b.op("Softmax", logits, axis=-1)
    weights, experts = b.ops("TopK", scores, b.ints(TOP_K), outputs=2, axis=-1)
    total = b.op("ReduceSum", weights, b.ints(-1), keepdims=1)
    return b.op("Div", weights, total), experts


def one_operator(b: GraphBuilder, x: str, hidden: int, **attrs: object) -> str:
    given = {"activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1}
    width = FFN if attrs.get("activation_type") == "gelu" else 2 * FFN
    return b.op(
        "MoE", x, router(b, x, hidden), b.near(0, EXPERTS, width, hidden),
        b.near(0, EXPERTS, width), b.near(0, EXPERTS, hidden, FFN), b.near(0, EXPERTS, hidden),
        domain=MICROSOFT, k=TOP_K, **{**given, **attrs},
    )  # fmt: skip


def with_limits(b: GraphBuilder, x: str, hidden: int) -> str:
    return one_operator(
        b, x, hidden, activation_alpha=1.702, activation_beta=1.0, swiglu_limit=0.5,
        normalize_routing_weights=0,
    )  # fmt: skip


def with_gelu(b: GraphBuilder, x: str, hidden: int) -> str:
    return one_operator(b, x, hidden, activation_type="gelu", swiglu_fusion=0)


def choice_before_operator(b: GraphBuilder, x: str, hidden: int) -> str:
    """What onnxruntime-genai's builder writes for LFM2: sigmoid scores, a bias for the choice."""
    scores = b.op("Sigmoid", router(b, x, hidden))
    by = b.op("Add", scores, b.near(0, EXPERTS))
    experts = b.ops("TopK", by, b.ints(TOP_K), outputs=2, axis=-1)[1]
    picked = b.op("GatherElements", scores, experts, axis=1)
    total = b.op("ReduceSum", picked, b.ints(-1), keepdims=1)
    share = b.op("Div", total, b.op("Add", total, b.constant(1e-6)))
    scale = b.op("Mul", share, b.constant(2.5))
    nothing = b.op("Expand", b.constant(-1e4), b.op("Shape", scores))
    logits = b.op("ScatterElements", nothing, experts, b.op("Log", picked), axis=1)
    mixed = b.op(
        "MoE", x, logits, b.near(0, EXPERTS, 2 * FFN, hidden), "",
        b.near(0, EXPERTS, hidden, FFN), "", domain=MICROSOFT, k=TOP_K, activation_type="swiglu",
        swiglu_fusion=1, normalize_routing_weights=1,
    )  # fmt: skip
    return b.op("Mul", mixed, b.op("Unsqueeze", scale, b.ints(0)))


def gathered_matrices(b: GraphBuilder, x: str, hidden: int) -> str:
    """What torch.onnx writes for transformers 5: products with matrices picked by token."""
    weights, experts = chosen(b, router(b, x, hidden))
    flat = b.op("Unsqueeze", b.op("Reshape", experts, b.ints(-1)), b.ints(-1))
    rows = b.op("Reshape", x, b.ints(-1, 1, hidden))
    pairs = b.op("Expand", rows, b.ints(1, TOP_K, 1))
    pairs = b.op("Reshape", pairs, b.ints(-1, hidden, 1))
    up = b.op("GatherND", b.near(0, EXPERTS, 2 * FFN, hidden), flat)
    gate, linear = b.ops("Split", b.op("MatMul", up, pairs), outputs=2, axis=1, num_outputs=2)
    inner = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), linear)
    down = b.op("GatherND", b.near(0, EXPERTS, hidden, FFN), flat)
    parts = b.op("Squeeze", b.op("MatMul", down, inner), b.ints(-1))
    parts = b.op("Mul", parts, b.op("Reshape", weights, b.ints(-1, 1)))
    by_token = b.op("Reshape", parts, b.ints(-1, TOP_K, hidden))
    total = b.op("ReduceSum", by_token, b.ints(1), keepdims=0)
    return b.op("Unsqueeze", total, b.ints(0))


def loop_over_experts(
    b: GraphBuilder, x: str, hidden: int, *, add: bool = True, ffn: int = FFN
) -> str:
    """What torch.onnx writes for a loop: rows of each expert's tokens, scattered back."""
    weights, experts = chosen(b, router(b, x, hidden))
    rows = b.op("Reshape", x, b.ints(-1, hidden))
    hot = b.op("OneHot", experts, b.constant(EXPERTS, np.int64), b.constant([0, 1], np.int64))
    mask = b.op("Transpose", hot, perm=[2, 1, 0])
    total = b.op("Expand", b.constant(0), b.op("Shape", rows))
    for expert in range(EXPERTS):
        own = b.op("Gather", mask, b.constant(expert, np.int64), axis=0)
        places = b.op("NonZero", own)
        slot = b.op("Gather", places, b.constant(0, np.int64), axis=0)
        token = b.op("Gather", places, b.constant(1, np.int64), axis=0)
        mine = b.op("Gather", rows, token, axis=0)
        gate = b.op("MatMul", mine, b.weight(hidden, ffn))
        linear = b.op("MatMul", mine, b.weight(hidden, ffn))
        inner = b.op("Mul", linear, b.op("Mul", gate, b.op("Sigmoid", gate)))
        result = b.op("MatMul", inner, b.weight(ffn, hidden))
        pair = b.op("Concat", b.op("Unsqueeze", token, b.ints(1)),
                    b.op("Unsqueeze", slot, b.ints(1)), axis=1)  # fmt: skip
        weight = b.op("Unsqueeze", b.op("GatherND", weights, pair), b.ints(1))
        result = b.op("Mul", result, weight)
        at = b.op("Unsqueeze", token, b.ints(1))
        if add:
            total = b.op("ScatterND", total, at, result, reduction="add")
        else:
            nothing = b.op("Expand", b.constant(0), b.op("Shape", rows))
            total = b.op("Add", total, b.op("ScatterND", nothing, at, result))
    return b.op("Unsqueeze", total, b.ints(0))


def loop_with_sums(b: GraphBuilder, x: str, hidden: int) -> str:
    return loop_over_experts(b, x, hidden, add=False)


MIXTURES: dict[str, tuple[Callable[[GraphBuilder, str, int], str], Routing]] = {
    "one operator": (one_operator, Routing(EXPERTS, TOP_K, "softmax", "sum")),
    "limits": (with_limits, Routing(EXPERTS, TOP_K, "softmax", "none")),
    "gelu": (with_gelu, Routing(EXPERTS, TOP_K, "softmax", "sum")),
    "choice before": (
        choice_before_operator,
        Routing(EXPERTS, TOP_K, "sigmoid", "sum", float(np.float32(1e-6)), 2.5),
    ),
    "gathered": (gathered_matrices, Routing(EXPERTS, TOP_K, "none", "softmax")),
    "loop": (loop_over_experts, Routing(EXPERTS, TOP_K, "none", "softmax")),
    "loop with sums": (loop_with_sums, Routing(EXPERTS, TOP_K, "none", "softmax")),
}


def calls(model: CanonicalModel, name: str) -> list[relax.Call]:
    return [call for call in every_call(model) if call.op.name == name]


def every_call(model: CanonicalModel) -> list[relax.Call]:
    values = [binding.value for binding in model.module["main"].body.blocks[0].bindings]
    return [v for v in values if isinstance(v, relax.Call)]


def check(model: CanonicalModel, path: Path) -> None:
    want = run_onnxruntime(path, TOKENS)
    assert np.abs(evaluate(model, TOKENS) - want).max() <= 2e-6 * np.ptp(want)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_form_of_a_mixture_is_one_op_with_its_routing(name: str, tmp_path: Path) -> None:
    block, routing = MIXTURES[name]
    path = save(build(Tiny(block=block, layers=2)), tmp_path)
    model = import_onnx(path, context=24)
    found = calls(model, "slm.moe")
    assert len(found) == 2
    for call in found:
        got = Routing.of(call.attrs)
        assert got.scale == pytest.approx(routing.scale, rel=1e-6)
        assert Routing(**{**vars(got), "scale": routing.scale}) == routing
    check(model, path)


def interleaved_operator(b: GraphBuilder, x: str, hidden: int) -> str:
    up, down = b.weight(EXPERTS, 2 * LARGE_FFN, hidden), b.weight(EXPERTS, hidden, LARGE_FFN)
    return b.op(
        "MoE", x, router(b, x, hidden), up, "", down, "", domain=MICROSOFT, k=TOP_K,
        activation_type="swiglu", swiglu_fusion=1,
    )  # fmt: skip


def large_loop(b: GraphBuilder, x: str, hidden: int) -> str:
    return loop_over_experts(b, x, hidden, ffn=LARGE_FFN)


@pytest.mark.slow
@pytest.mark.parametrize("block", [large_loop, interleaved_operator])
def test_weights_of_experts_are_imported_without_a_copy(
    block: Callable[[GraphBuilder, str, int], str], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(build(Tiny(block=block, hidden=96)), path, save_as_external_data=True)
    import_onnx(path, context=24)  # for what is made once
    tracemalloc.start()
    model = import_onnx(path, context=24)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    experts = [layer for layer in model.layers if layer.kind == "experts"]
    assert peak < sum(layer.weight_bytes for layer in experts) / 2


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 32), (4, 0), (8, 0), (2, 16), (2, 0)])
@pytest.mark.parametrize("zero_points", [False, True])
def test_quantized_experts_keep_their_values(
    bits: int, block: int, zero_points: bool, tmp_path: Path
) -> None:
    """Of 8 bits against the same experts dequantized: onnxruntime rounds their activations."""
    hidden, ffn = 32, 64
    rng = np.random.default_rng(0)

    def packed(n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        groups = k // block if block else 1
        q = rng.integers(0, 1 << bits, (EXPERTS, n, k), dtype=np.uint8)
        zeros = rng.integers(1 << bits - 2, 3 << bits - 2, (EXPERTS, n, groups), dtype=np.uint8)
        zeros = zeros if zero_points else np.full_like(zeros, 1 << bits - 1)
        scales = rng.random((EXPERTS, n, groups)).astype(np.float32) / (1 << bits)
        size = k // groups
        spread = [np.repeat(a.astype(np.float32), size, axis=2) for a in (zeros, scales)]
        w = (q - spread[0]) * spread[1]
        if bits < 8:
            q = pack_rows(q.reshape(-1, k), bits).reshape(EXPERTS, n, -1)
            along = zeros if block else zeros[:, :, 0]
            rows = pack_rows(along.reshape(-1, along.shape[-1]), bits)
            zeros = rows.reshape(*along.shape[:-1], -1)
        elif not block:
            zeros = zeros[:, :, 0]
        return w, q, scales if block else scales[:, :, 0], zeros

    up, down = packed(2 * ffn, hidden), packed(hidden, ffn)
    attrs = {
        "k": TOP_K, "activation_type": "swiglu", "swiglu_fusion": 1,
        "normalize_routing_weights": 1, "domain": MICROSOFT,
    }  # fmt: skip

    def quantized(b: GraphBuilder, x: str, width: int) -> str:
        names = [b.constant(a, a.dtype) for a in (*up[1:], *down[1:])]
        extra = {"expert_weight_bits": bits, **({"block_size": block} if block else {})}
        zeros = ["", "", "", names[2], names[5]] if zero_points else []
        return b.op(
            "QMoE", x, router(b, x, width), names[0], names[1], "", names[3], names[4], "",
            *zeros, **attrs, **extra,
        )  # fmt: skip

    def floats(b: GraphBuilder, x: str, width: int) -> str:
        return b.op(
            "MoE", x, router(b, x, width), b.constant(up[0]), "", b.constant(down[0]), "", **attrs
        )  # fmt: skip

    tiny = {"hidden": hidden, "heads": 4, "kv_heads": 4}
    path = save(build(Tiny(block=quantized, **tiny)), tmp_path)
    plain = save(build(Tiny(block=floats, **tiny)), tmp_path, "plain.onnx")
    model = import_onnx(path, context=24)
    (call,) = calls(model, "slm.moe")
    assert call.attrs["up_format"] == f"int{bits}"
    want = run_onnxruntime(path if bits < 8 else plain, TOKENS)
    # The reference rounds activations where the file asks for it.
    tolerance = 2e-2 if call.attrs["up_activation"] == "block" else 2e-6
    assert np.abs(evaluate(model, TOKENS) - want).max() <= tolerance * np.ptp(want)


@pytest.mark.parametrize(
    ("attrs", "said"),
    [({"use_sparse_mixer": 1}, "sparse mixer"), ({"activation_type": "tanh"}, "'tanh'")],
)
def test_experts_that_cannot_be_compiled_are_refused(
    attrs: dict[str, object], said: str, tmp_path: Path
) -> None:
    def block(b: GraphBuilder, x: str, hidden: int) -> str:
        return one_operator(b, x, hidden, **attrs)

    path = save(build(Tiny(block=block)), tmp_path)
    with pytest.raises(SlmError, match=said):
        import_onnx(path, context=24)


def conv_with_state(b: GraphBuilder, x: str, hidden: int) -> str:
    turned = b.op("Transpose", x, perm=[0, 2, 1])
    weight, bias = b.near(0, hidden, 1, 3), b.near(0, hidden)
    y = b.ops("CausalConvWithState", turned, weight, bias, outputs=2, domain=MICROSOFT,
              activation="silu")[0]  # fmt: skip
    return b.op("Transpose", y, perm=[0, 2, 1])


def conv_trimmed(b: GraphBuilder, x: str, hidden: int, before: int = 3) -> str:
    """Gated as in LFM2: c * conv(b * v), more padding than needed cut off behind."""
    joint = b.op("Transpose", b.op("MatMul", x, b.weight(hidden, 3 * hidden)), perm=[0, 2, 1])
    gate, out, value = b.ops("Split", joint, outputs=3, axis=1, num_outputs=3)
    inner = b.op("Mul", gate, value)
    y = b.op("Conv", inner, b.near(0, hidden, 1, 4), group=hidden, pads=[before, 3])
    length = b.op("Shape", x, start=1, end=2)
    y = b.op("Slice", y, b.ints(0), length, b.ints(2))
    return b.op("Transpose", b.op("Mul", out, y), perm=[0, 2, 1])


@pytest.mark.parametrize("block", [conv_with_state, conv_trimmed])
def test_a_causal_convolution_is_one_op(
    block: Callable[[GraphBuilder, str, int], str], tmp_path: Path
) -> None:
    path = save(build(Tiny(block=block, layers=2)), tmp_path)
    model = import_onnx(path, context=24)
    assert [int(c.attrs["layer"]) for c in calls(model, "slm.causal_conv")] == [0, 1]
    check(model, path)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_dynamically_quantized_convolution_rounds_each_row(
    per_channel: bool, tmp_path: Path
) -> None:
    path = tmp_path / "quantized.onnx"
    source = save(build(Tiny(block=conv_trimmed)), tmp_path)
    quantize_dynamic(
        source, path, per_channel=per_channel, weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )  # fmt: skip
    assert "ConvInteger" in {node.op_type for node in onnx.load(path).graph.node}
    model = import_onnx(path, context=24)
    assert len(calls(model, "slm.causal_conv")) == 1
    assert any("a product with the identity" in note for note in model.notes)
    for token in range(8):  # of a single row, the tensor's range is the row's
        want = run_onnxruntime(path, np.array([token]))
        got = evaluate(model, np.array([token]))
        assert np.abs(got - want).max() <= 2e-4 * np.ptp(want)
    want, got = run_onnxruntime(path, TOKENS), evaluate(model, TOKENS)
    assert np.corrcoef(want.reshape(-1), got.reshape(-1))[0, 1] > 0.999


def test_a_convolution_that_reads_later_positions_is_refused(tmp_path: Path) -> None:
    def block(b: GraphBuilder, x: str, hidden: int) -> str:
        return conv_trimmed(b, x, hidden, before=2)

    path = save(build(Tiny(block=block)), tmp_path)
    with pytest.raises(SlmError):
        import_onnx(path, context=24)


@pytest.mark.slow
@pytest.mark.parametrize("block", [loop_over_experts, conv_trimmed])
def test_a_compiled_model_gives_onnxruntime_s_logits_one_token_or_many_at_a_time(
    block: Callable[[GraphBuilder, str, int], str], tmp_path: Path
) -> None:
    path = save(build(Tiny(block=block, layers=2)), tmp_path)
    slmtvm.compile(path, ["host"], output=tmp_path / "m.slm", context=24, kv="f32")
    want = run_onnxruntime(path, TOKENS)
    with slmtvm.load(tmp_path / "m.slm") as session:
        got = session.eval_all(TOKENS)
        session.reset()
        singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(len(TOKENS))])
    assert np.abs(got - want).max() <= 5e-6 * np.ptp(want)
    np.testing.assert_array_equal(singly, got)


def outputs(model: onnx.ModelProto, kind: str) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == kind]


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("Split", -30.0, 30.0), ("Softmax", 1e-3, 1.0), ("Div", 0.0, 0.99), ("ReduceSum", 0.3, 1.0),
     ("Reshape", -30.0, 30.0), ("Squeeze", -300.0, 300.0)],
)  # fmt: skip
def test_a_bound_inside_of_a_mixture_is_not_lost(kind, low, high, tmp_path):
    """On a gate's input, scores, weights, their sum, the rows and the results of experts."""
    model = build(Tiny(block=gathered_matrices))
    nodes = list(model.graph.node)
    choice = next(i for i, node in enumerate(nodes) if node.op_type == "TopK")
    inside = {name for node in nodes[choice - 3 :] for name in node.output}
    value = next(name for name in outputs(model, kind) if name in inside)
    bounds = [numpy_helper.from_array(np.float32(v), n) for v, n in ((low, "low"), (high, "high"))]
    model.graph.initializer.extend(bounds)
    insert_after(model, value, lambda x, y: [helper.make_node("Clip", [x, "low", "high"], [y])])
    path = save(model, tmp_path)
    try:
        imported = import_onnx(path, context=24)
    except UnsupportedOpError:
        return
    assert "relax.minimum" in {call.op.name for call in every_call(imported)}
    check(imported, path)


def test_a_gate_with_a_limit_is_no_gate_without(tmp_path):
    """gpt-oss's, where the graph spells it."""
    model = build(Tiny(block=loop_over_experts))
    bound = numpy_helper.from_array(np.float32(7.0), "limit")
    model.graph.initializer.append(bound)
    sigmoid = outputs(model, "Sigmoid")[0]
    gate = next(n.input[0] for n in model.graph.node if n.output[0] == sigmoid)
    insert_after(model, gate, lambda x, y: [helper.make_node("Min", [x, "limit"], [y])])
    with pytest.raises(UnsupportedOpError):
        import_onnx(save(model, tmp_path), context=24)
