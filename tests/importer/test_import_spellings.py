"""One model in many spellings: what is recognised, and that it computes what the file computes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import slmtvm
from slmtvm.compiler import compile_model
from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.spellings import (
    ACTIVATIONS,
    BIASES,
    CHUNKS,
    MASK_POSITIONS,
    MASKS,
    NORMS,
    OTHER_ACTIVATIONS,
    OTHER_MASKS,
    PATTERNS,
    ROPES,
    WINDOWS,
)

TOLERANCE = 2e-4  # of the logits' range


def op_names(model: CanonicalModel) -> list[str]:
    """The ops of ``main`` in order."""
    (block,) = model.module["main"].body.blocks
    return [b.value.op.name for b in block.bindings if hasattr(b.value, "op")]


def calls_of(model: CanonicalModel, name: str) -> list:
    (block,) = model.module["main"].body.blocks
    calls = [b.value for b in block.bindings if hasattr(b.value, "op")]
    return [call for call in calls if call.op.name == name]


def check(tiny: Tiny, folder: Path, context: int | None = 64) -> CanonicalModel:
    """Import the model and compare it with onnxruntime on random tokens."""
    path = save(build(tiny), folder)
    model = import_onnx(path, context=context)
    tokens = np.random.default_rng(1).integers(0, tiny.vocab, 45)
    want = run_onnxruntime(path, tokens)
    got = evaluate(model, tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_every_spelling_of_a_norm_becomes_one_op(norm, tmp_path):
    model = check(Tiny(norm=norm), tmp_path)
    expected = "slm.rms_norm" if norm.startswith("rms") else "slm.layer_norm"
    assert op_names(model).count(expected) == 3
    assert not {"relax.sqrt", "relax.power", "relax.divide"} & set(op_names(model))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_spelling_of_an_activation_becomes_one_op(activation, tmp_path):
    model = check(Tiny(activation=activation), tmp_path)
    names = [n for n in op_names(model) if not n.startswith("slm.")]
    gated = ["relax.multiply"] if activation.startswith("silu") else []
    assert names == ["relax.add", ACTIVATIONS[activation][1], *gated, "relax.add"]


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_an_activation_without_an_op_of_its_own_is_written_out_and_noted(activation, tmp_path):
    model = check(Tiny(activation=activation), tmp_path)
    assert any("elementwise ops outside known patterns" in note for note in model.notes)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_spelling_of_a_rope_becomes_tables_of_the_whole_context(rope, kv_heads, tmp_path):
    model = check(Tiny(rope=rope, heads=4, kv_heads=kv_heads, layers=2), tmp_path)
    assert op_names(model).count("slm.rope") == 4
    _, part, interleaved = ROPES[rope]
    for call in calls_of(model, "slm.rope"):
        assert bool(call.attrs["interleaved"]) == interleaved
    half = 8 // part // 2
    angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(half) / half)
    assert np.allclose(model.params["rope.cos"], np.cos(angles), atol=2e-5)
    assert np.allclose(model.params["rope.sin"], np.sin(angles), atol=2e-5)
    assert {spec.num_kv_heads for spec in model.kv} == {kv_heads}


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "operator"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keys_that_are_repeated_before_they_are_rotated_are_cached_once(rope, kv_heads, tmp_path):
    model = check(Tiny(rope=rope, heads=4, kv_heads=kv_heads, repeated="first"), tmp_path)
    assert {spec.num_kv_heads for spec in model.kv} == {kv_heads}


def test_values_of_fewer_heads_than_keys_are_cached_for_each_key_head_and_noted(tmp_path):
    model = check(Tiny(rope="operator", heads=4, kv_heads=2, repeated="first"), tmp_path)
    assert {spec.num_kv_heads for spec in model.kv} == {4}
    assert any("a value head, which is cached 2 times" in note for note in model.notes)


@pytest.mark.parametrize("base", [1e2, 1e8])
def test_a_rope_is_found_however_slowly_it_turns(base, tmp_path):
    model = check(Tiny(rope="rotate_half", head_dim=64, rope_base=base), tmp_path)
    assert op_names(model).count("slm.rope") == 2


@pytest.mark.parametrize("rope", ["rotate_half", "interleaved"])
def test_features_that_turn_at_far_positions_only_are_rotated(rope, tmp_path):
    # Sines are multiples of 1 / 32: those of slow features are zero at the first positions.
    tiny = Tiny(rope=rope, head_dim=24, rope_base=1000.0, rope_grid=2.0**-5)
    assert check(tiny, tmp_path).params["rope.cos"].shape == (64, 12)


def test_rotary_tables_that_change_with_the_length_are_refused(tmp_path):
    model = build(Tiny(rope="rotate_half"))
    (places,) = (n for n in model.graph.node if n.op_type == "Range")
    (cast,) = (n for n in model.graph.node if n.op_type == "Cast")
    total = helper.make_node("Cast", [places.input[1]], ["total"], to=TensorProto.FLOAT)
    near = helper.make_node("Div", [cast.output[0], "total"], ["near"])
    at = list(model.graph.node).index(cast) + 1
    model.graph.node.insert(at, near)
    model.graph.node.insert(at, total)
    for node in list(model.graph.node)[at + 2 :]:
        node.input[:] = ["near" if name == cast.output[0] else name for name in node.input]
    with pytest.raises(UnsupportedOpError, match="rotary tables change with the length"):
        import_onnx(save(model, tmp_path), context=64)


@pytest.mark.parametrize("bound", [30.0, 3e4])
def test_a_clamp_is_kept_however_far_out_it_stands(bound, tmp_path, monkeypatch):
    clamp = lambda b, x: b.op("Clip", x, b.constant(-bound), b.constant(bound))  # noqa: E731
    monkeypatch.setitem(OTHER_ACTIVATIONS, "clamp", clamp)
    model = check(Tiny(activation="clamp"), tmp_path)
    assert {"relax.minimum", "relax.maximum"} <= set(op_names(model))


@pytest.mark.parametrize(
    ("family", "tiny"),
    [
        ("bert", Tiny(norm="layer_operator", learned_positions=64, mask="none")),
        ("bloom", Tiny(norm="layer_operator", mask="by_key")),
        ("gpt2", Tiny(norm="layer_operator", learned_positions=64)),
        ("gpt-neox", Tiny(norm="layer_operator", rope="partial", activation="gelu_erf")),
        ("llama", Tiny(rope="rotate_half")),
        ("mistral", Tiny(rope="rotate_half", mask="window")),
        ("mpnet", Tiny(norm="layer_operator", learned_positions=64, mask="by_bucket")),
        ("qwen2", Tiny(rope="rotate_half", bias=True)),
        ("qwen3", Tiny(rope="rotate_half", qk_norm="shared", heads=4, kv_heads=2)),
    ],
)
def test_a_family_is_named_by_its_parts(family, tiny, tmp_path):
    assert import_onnx(save(build(tiny), tmp_path), context=64).family == family


@pytest.mark.parametrize("mask", MASKS)
def test_every_spelling_of_a_mask_is_named(mask, tmp_path):
    model = check(Tiny(mask=mask, learned_positions=70), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert attention.attrs["mask"] == MASKS[mask][1]
    assert model.kind == ("encoder" if mask == "none" else "decoder")


@pytest.mark.parametrize("mask", OTHER_MASKS)
def test_a_mask_that_cannot_be_compiled_is_refused_by_name(mask, tmp_path):
    path = save(build(Tiny(mask=mask)), tmp_path)
    with pytest.raises(UnsupportedOpError, match=re.escape(OTHER_MASKS[mask][1])):
        import_onnx(path, context=64)


@pytest.mark.parametrize("mask", WINDOWS)
@pytest.mark.parametrize("rope", ["", "rotate_half"])
def test_every_window_is_measured_on_the_whole_context(mask, rope, tmp_path):
    model = check(Tiny(mask=mask, rope=rope), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert attention.attrs["mask"] == "causal"
    assert int(attention.attrs["window"]) == WINDOWS[mask][1]


def test_a_window_as_wide_as_the_context_is_a_causal_mask(tmp_path):
    path = save(build(Tiny(mask="window")), tmp_path)
    (attention,) = calls_of(import_onnx(path, context=40), "slm.attention")
    assert int(attention.attrs["window"]) == 0
    (attention,) = calls_of(import_onnx(path, context=41), "slm.attention")
    assert int(attention.attrs["window"]) == 40


@pytest.mark.parametrize("mask", CHUNKS)
@pytest.mark.parametrize("rope", ["", "rotate_half"])
def test_blocks_of_positions_that_see_each_other_alone_are_measured(mask, rope, tmp_path):
    model = check(Tiny(mask=mask, rope=rope), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert attention.attrs["mask"] == CHUNKS[mask][1]
    assert int(attention.attrs["chunk"]) == 10


@pytest.mark.parametrize("mask", PATTERNS)
def test_a_mask_of_any_pattern_is_what_it_shows(mask, tmp_path):
    model = check(Tiny(mask=mask, learned_positions=70, layers=2), tmp_path)
    for attention in calls_of(model, "slm.attention"):
        assert attention.attrs["mask"] == PATTERNS[mask][1]
        assert attention.attrs["operands"] == "visible"
    (visible,) = (array for name, array in model.params.items() if "visible" in name)
    assert visible.shape == (3 if mask == "of_heads" else 1, 64, 8)
    assert any("of all pairs of positions" in note for note in model.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "heads"), [("global", 1), ("of_heads", 3), ("uneven", 3), ("both_ways", 1)]
)
def test_masks_of_any_pattern_compile(mask, heads, tmp_path):
    """As ``test_blocks_of_positions_compile``; a division of the prompt changes no bit."""
    path = save(build(Tiny(mask=mask, rope="rotate_half", kv_heads=heads)), tmp_path)
    context = 150
    bundle = compile_model(path, ["host"], output=tmp_path / "m.slm", context=context)
    tokens = np.random.default_rng(1).integers(0, 53, context)
    with slmtvm.load(bundle.path, threads=2, all_threads=True) as session:
        if PATTERNS[mask][1] == "causal":
            whole = session.eval_all(tokens)
            session.reset()
            parts = [session.eval_all(part) for part in np.split(tokens, [1, 2, 39, 40, 120])]
        else:
            whole = session.encode(tokens)
            parts = [session.encode(tokens)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("mask", CHUNKS)
def test_blocks_of_positions_compile(mask, tmp_path):
    """``compile_model`` compares with onnxruntime before it writes anything."""
    path = save(build(Tiny(mask=mask)), tmp_path)
    compile_model(path, ["x86-64-v3"], output=tmp_path / "m.slm", context=64)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_is_a_row_for_each_head(bias, softcap, tmp_path):
    model = check(Tiny(mask=bias, softcap=softcap), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert attention.attrs["mask"] == BIASES[bias][1]
    assert float(attention.attrs["softcap"]) == pytest.approx(softcap, rel=1e-6)
    table = model.params["attention.bias"]
    assert table.shape == ((3, 64) if BIASES[bias][1] == "causal" else (3, 127))
    assert attention.attrs["bias_by"] == ("key" if bias == "in_steps" else "distance")
    if bias == "by_distance":
        slopes = np.array([[0.5], [0.25], [0.125]])
        assert np.allclose(table, slopes * np.arange(-63, 1), rtol=1e-6)


def test_layers_of_one_bias_share_its_table(tmp_path):
    model = check(Tiny(mask="by_distance", layers=2), tmp_path)
    assert [name for name in model.params if name.startswith("attention.bias")] == [
        "attention.bias"
    ]


@pytest.mark.parametrize("mask", MASKS)
def test_heads_may_be_laid_out_otherwise_in_scores_than_in_values(mask, tmp_path):
    # As GPT-NeoX has it in older versions of transformers.
    check(Tiny(mask=mask, flat_heads=True), tmp_path)


@pytest.mark.parametrize("softcap", [0.3, 50.0])
@pytest.mark.parametrize("scale_on", ["scores", "queries"])
@pytest.mark.parametrize("mask", ["trilu", "where", "window"])
def test_a_cap_on_scores_is_found_under_every_mask(mask, scale_on, softcap, tmp_path):
    model = check(Tiny(mask=mask, softcap=softcap, scale_on=scale_on), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert float(attention.attrs["softcap"]) == pytest.approx(softcap, rel=1e-6)
    assert float(attention.attrs["scale"]) == pytest.approx(8**-0.5, rel=1e-5)
    assert "relax.tanh" not in op_names(model)


@pytest.mark.parametrize("qk_norm", ["shared", "own"])
@pytest.mark.parametrize("rope", ["", "rotate_half", "partial"])
def test_norms_of_heads_are_norms_of_parts_of_a_row(rope, qk_norm, tmp_path):
    model = check(Tiny(rope=rope, qk_norm=qk_norm, heads=4, kv_heads=2), tmp_path)
    groups = [int(c.attrs["groups"]) for c in calls_of(model, "slm.rms_norm")]
    assert sorted(groups) == [1, 1, 1, 2, 4]
    assert "relax.sqrt" not in op_names(model)
    own = [v for v in model.params.values() if v.shape in ((32,), (16,))]
    assert len(own) == (2 if qk_norm == "own" else 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope", ["", "rotate_half", "partial"])
def test_projections_packed_head_by_head_become_linear_layers_of_their_own(rope, bias, tmp_path):
    model = check(Tiny(bias=bias, rope=rope, packed_qkv="heads"), tmp_path)
    apart = check(Tiny(bias=bias, rope=rope), tmp_path)
    assert op_names(model) == op_names(apart)
    assert "relax.strided_slice" not in op_names(model)


@pytest.mark.parametrize("scale_on", ["scores", "queries", "both"])
@pytest.mark.parametrize("rope", ["", "rotate_half"])
def test_the_scale_of_attention_is_found_wherever_it_stands(scale_on, rope, tmp_path):
    model = check(Tiny(scale_on=scale_on, rope=rope, heads=4, kv_heads=2), tmp_path)
    (attention,) = calls_of(model, "slm.attention")
    assert float(attention.attrs["scale"]) == pytest.approx(8**-0.5, rel=1e-6)
    assert "relax.divide" not in op_names(model)


@pytest.mark.parametrize("rope", ["", "rotate_half"])
def test_packed_projections_become_linear_layers_of_their_own(rope, tmp_path):
    sizes = Tiny(bias=True, rope=rope, heads=4, kv_heads=2)
    packed = check(replace(sizes, packed_qkv="parts"), tmp_path)
    assert op_names(packed) == op_names(check(sizes, tmp_path))


def test_a_bias_belongs_to_its_linear_layer(tmp_path):
    model = check(Tiny(bias=True, learned_positions=64), tmp_path)
    with_bias = [c for c in calls_of(model, "slm.linear") if "bias" in str(c.attrs["operands"])]
    assert len(with_bias) == 7  # all but the head
    assert op_names(model).count("relax.add") == 3  # positions and the two residuals


def test_learned_positions_become_rows_of_a_table_and_bound_the_context(tmp_path):
    tiny = Tiny(learned_positions=70)
    model = check(tiny, tmp_path, context=None)
    assert model.context == 70
    assert model.params["positions.weight"].shape == (70, 24)
    with pytest.raises(UnsupportedOpError, match="the model's own tables have 70"):
        import_onnx(tmp_path / "model.onnx", context=71)


def test_positions_that_leave_out_padding_count_up_in_a_sequence_without_any(tmp_path):
    tiny = Tiny(learned_positions=70, padding=3, mask="none")
    path = save(build(tiny), tmp_path)
    model = import_onnx(path)
    assert model.context == 66  # position 0 is row 4 of the table
    assert model.padding == (3,)
    assert any("token 3 counts like any other" in note for note in model.notes)
    tokens = np.random.default_rng(1).integers(4, tiny.vocab, 66)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_a_comparison_of_tokens_that_counts_no_positions_is_refused(tmp_path):
    model = build(Tiny())
    (gather,) = (n for n in model.graph.node if n.op_type == "Gather")
    same = helper.make_node("Equal", ["input_ids", "one"], ["same"], name="same")
    added = helper.make_node("Cast", ["same"], ["added"], to=TensorProto.INT64)
    moved = helper.make_node("Add", ["input_ids", "added"], ["moved"], name="moved")
    for node in (moved, added, same):
        model.graph.node.insert(0, node)
    gather.input[1] = "moved"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    with pytest.raises(UnsupportedOpError, match="looks up rows by something other"):
        import_onnx(save(model, tmp_path))


@pytest.mark.parametrize("context", [4, 5, 7, 8, 11, 12])
@pytest.mark.parametrize("mask", ["trilu", "narrow", "by_key", "in_steps", "none"])
def test_short_contexts_are_imported_like_long_ones(mask, context, tmp_path):
    path = save(build(Tiny(mask=mask, rope="rotate_half", qk_norm="shared")), tmp_path)
    model = import_onnx(path, context=context)
    assert model.context == context
    tokens = np.arange(3, 3 + context)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(model, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_a_context_of_three_positions_is_refused(tmp_path):
    with pytest.raises(UnsupportedOpError, match="at least 4 are needed"):
        import_onnx(save(build(Tiny()), tmp_path), context=3)


def test_a_stored_mask_bounds_the_context(tmp_path):
    path = save(build(Tiny(mask="sliced")), tmp_path)
    assert import_onnx(path).context == MASK_POSITIONS


def test_without_tables_the_context_is_1024(tmp_path):
    path = save(build(Tiny(rope="rotate_half")), tmp_path)
    assert import_onnx(path).context == 1024


def test_a_tied_head_reads_the_embedding_s_own_array(tmp_path):
    model = check(Tiny(tied=True), tmp_path)
    head = calls_of(model, "slm.linear")[-1]
    embedding = calls_of(model, "slm.embedding")[0]
    assert head.args[1].same_as(embedding.args[1])


def test_weights_are_views_of_the_file(tmp_path):
    model = check(Tiny(), tmp_path)
    for name, array in model.params.items():
        if array.ndim == 2 and not name.startswith("rope"):
            assert array.base is not None and not array.flags.writeable, name
