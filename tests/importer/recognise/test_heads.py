"""What heads make of rows: outputs that are pooled, and several of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate_outputs
from slmtvm.verify import Reference
from tests.importer.heads import (
    BOTH_HALVES,
    CAUSAL_ENCODERS,
    DECODERS,
    DIM,
    ENCODERS,
    END,
    LABELS,
    MASKED_DECODERS,
    PAD,
    VOCAB,
    save_head,
)

TOKENS = np.random.default_rng(2).integers(2, VOCAB, 20)
RANGE = 2e-4  # of a whole output's


def _close(got: np.ndarray, want: np.ndarray) -> bool:
    size = max(float(np.ptp(want)), float(np.abs(want).max()))
    return bool(np.abs(got.reshape(want.shape) - want).max() <= RANGE * size)


def _masks() -> dict[str, np.ndarray]:
    holes = np.random.default_rng(1).random(len(TOKENS)) < 0.6
    places = np.arange(len(TOKENS))
    return {"left": places >= 6, "right": places < 13, "holes": holes}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_outputs_are_what_onnxruntime_computes(name: str, tmp_path: Path) -> None:
    head = ENCODERS[name]
    path = save_head(head, tmp_path)
    model = import_onnx(path)
    assert model.kind == "encoder"
    assert tuple(o.name for o in model.outputs) == head.outputs
    assert {o.name for o in model.outputs if o.pooled} == head.pooled
    assert not model.left_out
    for count in (1, len(TOKENS)):
        want = Reference(path).run(TOKENS[:count], head.outputs)
        got = evaluate_outputs(model, TOKENS[:count])
        for output, ours, theirs in zip(model.outputs, got, want, strict=True):
            assert ours.shape == ((output.features,) if output.pooled else (count, output.features))
            assert _close(ours, theirs[0])


def test_a_pooling_that_is_not_known_under_a_mask_is_refused_there(tmp_path: Path) -> None:
    path = save_head(ENCODERS["max_of_written_over"], tmp_path)
    with pytest.raises(UnsupportedOpError, match="the max of rows does not leave out hidden ones"):
        import_onnx(path, mask="arbitrary")


_UNDER_MASKS = [n for n in ENCODERS if n not in ("last_of_all", "max_of_written_over")]


@pytest.mark.parametrize("name", _UNDER_MASKS)
def test_hidden_tokens_enter_no_pooled_output(name: str, tmp_path: Path) -> None:
    head = ENCODERS[name]
    path = save_head(head, tmp_path)
    model = import_onnx(path, mask="arbitrary")
    assert model.mask == "keys"
    for mask in _masks().values():
        want = Reference(path).run(TOKENS, head.outputs, mask=mask)
        for output, ours, theirs in zip(
            model.outputs, evaluate_outputs(model, TOKENS, mask=mask), want, strict=True
        ):
            seen = slice(None) if output.pooled else mask
            assert _close(ours[seen], theirs[0][seen])


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_output_of_its_last_token_is_one_of_each_token(
    name: str, tmp_path: Path
) -> None:
    head = DECODERS[name]
    path = save_head(head, tmp_path)
    model = import_onnx(path)
    assert model.kind == "decoder"
    assert tuple(o.name for o in model.outputs) == head.outputs
    assert {o.name for o in model.outputs if o.pooled} == head.pooled
    got = evaluate_outputs(model, TOKENS)
    for count in (1, 7, len(TOKENS)):
        want = Reference(path).run(TOKENS[:count], head.outputs)
        for output, ours, theirs in zip(model.outputs, got, want, strict=True):
            last = theirs[0] if output.pooled else theirs[0][-1]
            assert _close(ours[count - 1], last)


@pytest.mark.parametrize("name", CAUSAL_ENCODERS)
def test_what_is_pooled_of_rows_that_see_only_earlier_ones_needs_them_all(
    name: str, tmp_path: Path
) -> None:
    head = CAUSAL_ENCODERS[name]
    path = save_head(head, tmp_path)
    model = import_onnx(path)
    assert model.kind == "encoder"
    for count in (1, 7, len(TOKENS)):
        want = Reference(path).run(TOKENS[:count], head.outputs)
        for ours, theirs in zip(evaluate_outputs(model, TOKENS[:count]), want, strict=True):
            assert _close(ours, theirs[0])


@pytest.mark.parametrize("name", MASKED_DECODERS)
def test_what_each_token_of_a_decoder_sees(name: str, tmp_path: Path) -> None:
    head = MASKED_DECODERS[name]
    path = save_head(head, tmp_path)
    model = import_onnx(path)
    told = [note for note in model.notes if "each token sees itself and those before" in note]
    assert (model.kind, len(told)) == ("decoder", name == "pairs")
    for count in (1, 7, len(TOKENS)):
        want = Reference(path).run(TOKENS[:count], head.outputs)
        for ours, theirs in zip(evaluate_outputs(model, TOKENS[:count]), want, strict=True):
            assert _close(ours, theirs[0])


def test_a_mask_of_pairs_without_a_cache_is_refused(tmp_path: Path) -> None:
    path = save_head(MASKED_DECODERS["pairs"], tmp_path)
    model = onnx.load(path)
    del model.graph.input[-1]
    onnx.save(model, path)
    with pytest.raises(UnsupportedOpError, match="a mask of every pair of positions"):
        import_onnx(path)


@pytest.mark.parametrize("name", BOTH_HALVES)
def test_a_classifier_whose_halves_both_read_the_text(name: str, tmp_path: Path) -> None:
    path = save_head(BOTH_HALVES[name], tmp_path)
    model = import_onnx(path)
    assert (model.kind, model.final_token) == ("encoder", END)
    assert model.padding == ((PAD,) if name == "classifier_that_wraps_around" else ())
    tokens = TOKENS.copy()
    tokens[[8, -1]] = END  # as between the texts of a pair
    for text in (tokens[-1:], tokens[:9], tokens):
        want = Reference(path).run(text, ["logits"])[0][0]
        assert _close(evaluate_outputs(model, text)[0], want)


def test_rows_that_are_looked_up_by_other_moves_of_tokens_are_refused(tmp_path: Path) -> None:
    path = save_head(BOTH_HALVES["classifier_by_both_halves"], tmp_path)
    model = onnx.load(path)
    moved = next(n for n in model.graph.node if n.op_type == "Concat" and n.attribute[0].i == 1)
    moved.input[:] = reversed(moved.input)  # the token after each one
    onnx.save(model, path)
    with pytest.raises(UnsupportedOpError):
        import_onnx(path)


@pytest.mark.parametrize("name", ["score_of_last_not_padding", "score_before_first_padding"])
def test_the_token_that_a_score_takes_for_padding_is_told(name: str, tmp_path: Path) -> None:
    model = import_onnx(save_head(DECODERS[name], tmp_path))
    assert model.padding == (PAD,)
    assert any(f"token {PAD} counts like any other" in note for note in model.notes)


def test_outputs_are_chosen_by_name_in_that_order(tmp_path: Path) -> None:
    path = save_head(ENCODERS["pooler"], tmp_path)
    model = import_onnx(path, outputs=["pooler_output"])
    assert [o.name for o in model.outputs] == ["pooler_output"]
    assert dict(model.left_out) == {"last_hidden_state": "it is not asked for"}
    both = import_onnx(path, outputs=["pooler_output", "last_hidden_state"])
    assert [o.name for o in both.outputs] == ["pooler_output", "last_hidden_state"]
    with pytest.raises(SlmError, match="no output 'pooled' to compile; the file has pooler_output"):
        import_onnx(path, outputs=["pooled"])


def test_a_state_inside_a_decoder_is_there_where_it_is_asked_for(tmp_path: Path) -> None:
    path = save_head(DECODERS["logits_and_value"], tmp_path)
    assert "ask for it by name" in import_onnx(path).left_out["hidden"]
    model = import_onnx(path, outputs=["logits", "hidden"])
    got = evaluate_outputs(model, TOKENS)
    want = Reference(path).run(TOKENS, ["logits", "hidden"])
    assert all(_close(ours, theirs[0]) for ours, theirs in zip(got, want, strict=True))


def _with_output(path: Path, nodes: list[onnx.NodeProto], name: str, dims: list[str | int]) -> None:
    model = onnx.load(path)
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    onnx.save(model, path)


def test_an_output_beside_the_first_that_cannot_be_compiled_is_left_out(tmp_path: Path) -> None:
    path = save_head(ENCODERS["twice"], tmp_path)
    softmax = next(n.output[0] for n in onnx.load(path).graph.node if n.op_type == "Softmax")
    attentions = helper.make_node("Identity", [softmax], ["attentions"])
    _with_output(path, [attentions], "attentions", ["batch", "heads", "seq", "seq"])
    model = import_onnx(path)
    assert [o.name for o in model.outputs] == ["a", "b"]
    assert list(model.left_out) == ["attentions"]
    assert any("'attentions' is not emitted" in note for note in model.notes)
    with pytest.raises(UnsupportedOpError):
        import_onnx(path, outputs=["attentions"])


@pytest.mark.parametrize(
    ("node", "attributes", "reason"),
    [
        ("ReduceSum", {"keepdims": 0}, "none of first, last, mean, weightedmean, max"),
        ("ReduceMin", {"keepdims": 0}, "none of first, last, mean, weightedmean, max"),
        ("Gather", {"axis": 1}, "none of first, last, mean, weightedmean, max"),
    ],
)
def test_other_poolings_are_refused_by_name(
    node: str, attributes: dict[str, int], reason: str, tmp_path: Path
) -> None:
    path = save_head(ENCODERS["twice"], tmp_path)
    model = onnx.load(path)
    kind = "scalar" if node == "Gather" else "axes"
    value = np.array(2 if kind == "scalar" else [1], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, "where"))
    model.graph.node.append(helper.make_node(node, ["a", "where"], ["pooled"], **attributes))
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", DIM])
    )
    onnx.save(model, path)
    with pytest.raises(UnsupportedOpError, match=reason) as caught:
        import_onnx(path)
    assert str(path) in str(caught.value)


def test_a_mean_that_counts_hidden_rows_takes_no_masks(tmp_path: Path) -> None:
    path = save_head(ENCODERS["twice"], tmp_path)
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("ReduceMean", ["a"], ["mean"], axes=[1], keepdims=0))
    model.opset_import[0].version = 17
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", DIM])
    )
    onnx.save(model, path)
    assert import_onnx(path).outputs[0].features == DIM
    with pytest.raises(UnsupportedOpError, match="the mean of rows does not leave out hidden"):
        import_onnx(path, mask="arbitrary")


def test_labels_are_features(tmp_path: Path) -> None:
    model = import_onnx(save_head(ENCODERS["classifier"], tmp_path))
    assert model.outputs[0].features == LABELS
    assert model.hidden_size == DIM


def test_token_types_are_an_input_of_an_encoder(tmp_path: Path) -> None:
    path = save_head(ENCODERS["classifier"], tmp_path, types="table")
    model = import_onnx(path, mask="arbitrary")
    assert (model.segments, model.mask) == (2, "keys")
    second = (np.arange(len(TOKENS)) >= 8).astype(np.int32)
    reference = Reference(path)
    plain = reference.run(TOKENS, ["logits"])[0][0]
    assert _close(evaluate_outputs(model, TOKENS)[0], plain)
    for mask in (None, *_masks().values()):
        (want,) = reference.run(TOKENS, ["logits"], mask=mask, segments=second)
        assert not _close(want[0], plain)
        assert _close(evaluate_outputs(model, TOKENS, mask=mask, segments=second)[0], want[0])


def test_token_types_of_another_use_are_zeros_and_noted(tmp_path: Path) -> None:
    path = save_head(ENCODERS["classifier"], tmp_path, types="numbers")
    model = import_onnx(path)
    assert model.segments == 0
    assert any("token types are taken for zeros" in note for note in model.notes)
    assert _close(evaluate_outputs(model, TOKENS)[0], Reference(path).run(TOKENS, ["logits"])[0][0])


def test_a_decoder_has_no_token_types(tmp_path: Path) -> None:
    path = save_head(DECODERS["last_logits"], tmp_path, types="table")
    model = import_onnx(path)
    assert (model.kind, model.segments) == ("decoder", 0)
