"""What each pass makes of a small decoder."""

from __future__ import annotations

from collections import Counter

import pytest
from tvm import relax
from tvm.ir import Op

from slmtvm.ir import ops
from slmtvm.ir.fused import ROW
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.pipeline import fuse, passes
from slmtvm.passes.rewrite import bindings, function_names
from slmtvm.schedules.rows import Pair
from tests.passes.toy import Layer, decoder


def op_counts(model: CanonicalModel, function: str) -> Counter[str]:
    return Counter(
        b.value.op.name
        for b in bindings(model.module[function])
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, Op)
    )


def test_every_pass_has_a_kebab_case_name_of_its_own() -> None:
    names = [step.name for step in passes()]
    assert len(set(names)) == len(names)
    assert all(n == n.lower() and "_" not in n for n in names)


@pytest.mark.parametrize(
    ("weight_format", "linear"),
    [
        ("int4", "slm.quantized_linear"),
        ("int8", "slm.quantized_linear"),
        ("f32", "slm.float_linear"),
    ],
)
def test_a_decoder_layer_becomes_four_linears_one_attention_and_row_ops(
    weight_format: str, linear: str
) -> None:
    fused = fuse(decoder(weight_format, layers=3))
    counts = op_counts(fused, "body_1")
    rows = 4 if weight_format != "f32" else 3
    assert counts == {
        "slm.embedding": 1,
        linear: 3 * 4,
        "slm.qkv_attention": 3,
        "slm.row": 3 * rows,
    }
    assert op_counts(fused, "head_1") == {"slm.row": 1, linear: 1}


@pytest.mark.parametrize("gate", [relax.op.nn.gelu, relax.op.nn.gelu_tanh, relax.op.nn.relu])
def test_every_activation_is_fused_with_the_product_that_it_gates(gate: object) -> None:
    usual = op_counts(fuse(decoder("int4", layers=1)), "body_1")
    assert op_counts(fuse(decoder("int4", variants=[Layer(gate=gate)])), "body_1") == usual


def test_a_gate_that_is_rounded_stays_apart_from_the_product() -> None:
    def rounded(x: relax.Expr) -> relax.Expr:
        return ops.quantize_dequantize(relax.op.nn.silu(x), scale=0.05, low=-128, high=127)

    fused = fuse(decoder("f32", variants=[Layer(gate=rounded)]))
    assert op_counts(fused, "body_1")["relax.multiply"] == 1


def test_a_sum_of_integers_and_its_rounding_become_one_row_op() -> None:
    def rounded(x: relax.Expr) -> relax.Expr:
        return ops.quantize_dequantize(x, scale=0.5, low=-128, high=127)

    def doubled(x: relax.Expr) -> relax.Expr:
        pair = Pair("add", 0.5, 0, 0.5, 0, 0.5, 0)
        return rounded(ops.integer_pair(rounded(x), rounded(x), pair=pair))

    fused = fuse(decoder("f32", variants=[Layer(gate=doubled)]))
    made = [b.value for b in bindings(fused.module["body_1"]) if isinstance(b.value, relax.Call)]
    rows = [(str(c.attrs["prologue"]), str(c.attrs["epilogue"])) for c in made if c.op == ROW]
    assert Counter(rows)["pair", "rounded"] == 1
    assert not {"slm.integer_pair", "slm.quantize_dequantize"} & {c.op.name for c in made}


def test_norms_of_heads_become_part_of_attention_on_merged_projections() -> None:
    kinds = [Layer(norm="heads", window=8), Layer(norm="heads", q_base=0, k_base=0, softcap=2.0)]
    fused = fuse(decoder("f32", variants=kinds))
    usual = op_counts(fuse(decoder("f32", layers=2)), "body_1")
    assert op_counts(fused, "body_1") == usual


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (Layer(norm="rows"), {"slm.row": 2}),
        (Layer(norm="heads", norm_last=True), {"slm.rope": 2}),
        (Layer(k_base=500.0), {"slm.rope": 2}),
        (Layer(k_base=0.0, norm="heads"), {"slm.rope": 1, "slm.row": 1}),
    ],
    ids=lambda v: str(v),
)
def test_what_attention_cannot_do_itself_is_done_before_it(
    kind: Layer, left: dict[str, int]
) -> None:
    usual = op_counts(fuse(decoder("f32", layers=1)), "body_1")
    more = op_counts(fuse(decoder("f32", variants=[kind])), "body_1") - usual
    separate = {"slm.float_linear": 2}  # q, k and v are not one layer
    assert more == Counter(separate) + Counter(left)


def test_rows_are_bound_to_the_chunk_sizes() -> None:
    fused = fuse(decoder())
    kinds = {"batch": (4,), "batchhead": (4,), "body": (1, 16), "head": (1, 16)}
    assert set(function_names(fused.module)) == {
        f"{kind}_{rows}" for kind, sizes in kinds.items() for rows in sizes
    }
    for name in function_names(fused.module):
        rows = int(name.split("_")[1])
        assert int(fused.module[name].params[0].ty.shape.values[0]) == rows


def test_merged_weights_keep_their_bits_and_the_parts_are_dropped() -> None:
    model = decoder("int4", layers=1)
    fused = fuse(model)
    merged = fused.params["0.q.weight+0.k.weight+0.v.weight"]
    parts = [model.params[f"0.{name}.weight"] for name in "qkv"]
    assert merged.tobytes() == b"".join(p.tobytes() for p in parts)
    assert not any(f"0.{name}.weight" in fused.params for name in "qkv")


def test_a_scale_for_the_whole_tensor_becomes_one_for_each_channel_where_layers_merge() -> None:
    fused = fuse(decoder("int8", layers=1))
    assert fused.params["0.gate.scales+0.up.scales"].shape == (2 * 96,)


@pytest.mark.parametrize(("channels", "linears"), [(32, 4), (64, 7)])
def test_layers_scaled_by_blocks_of_channels_merge_where_no_block_is_cut(
    channels: int, linears: int
) -> None:
    # Keys and values have 32 channels each, gates 96.
    fused = fuse(decoder(f"int4-c{channels}", layers=1))
    assert op_counts(fused, "body_1")["slm.float_linear"] == linears
    merged = {name: a.shape for name, a in fused.params.items() if "scales+" in name}
    assert merged == ({} if linears == 7 else {
        "0.q.scales+0.k.scales+0.v.scales": (4, 64), "0.gate.scales+0.up.scales": (6, 64),
    })  # fmt: skip


def test_layers_that_read_different_inputs_are_not_merged() -> None:
    fused = fuse(decoder("int4", layers=1))
    assert "0.o.weight" in fused.params
    assert "0.down.weight" in fused.params
