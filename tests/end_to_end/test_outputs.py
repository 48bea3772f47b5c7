"""Bundles with pooled and with several outputs, against onnxruntime and against their own bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.compiler import compile_model
from slmtvm.errors import DeviceError
from slmtvm.verify import Reference
from tests.importer.heads import (
    BOTH_HALVES,
    CAUSAL_ENCODERS,
    DECODERS,
    DIM,
    ENCODERS,
    END,
    LABELS,
    VOCAB,
    Head,
    save_head,
)

RANGE = 2e-4
TOKENS = np.random.default_rng(2).integers(2, VOCAB, 41)


def _compile(head: Head, folder: Path, mask: str = "none") -> tuple[Path, Reference]:
    path = save_head(head, folder)
    compile_model(path, output=folder / "x.slm", kv="f32", mask=mask)
    return folder / "x.slm", Reference(path)


def _close(got: np.ndarray, want: np.ndarray) -> bool:
    size = max(float(np.ptp(want)), float(np.abs(want).max()))
    return bool(np.abs(got.reshape(want.shape) - want).max() <= RANGE * size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "tokens_and_embedding", "span"])
def test_all_outputs_of_an_encoder_come_by_their_names(name: str, tmp_path: Path) -> None:
    bundle, reference = _compile(ENCODERS[name], tmp_path)
    names = ENCODERS[name].outputs
    with slmtvm.load(bundle) as session:
        for count in (1, 16, 41):  # some of whose rows are padding
            tokens = TOKENS[:count]
            got, want = session.outputs(tokens), reference.run(tokens, names)
            assert tuple(got) == names
            assert all(_close(got[n], w[0]) for n, w in zip(names, want, strict=True))
            np.testing.assert_array_equal(session.encode(tokens), got[names[0]])
        visible = np.arange(41) < 23
        want = reference.run(TOKENS, names, mask=visible)
        for n, ours, theirs in zip(
            names, session.outputs(TOKENS, visible).values(), want, strict=True
        ):
            pooled = n in ENCODERS[name].pooled
            seen = slice(None) if pooled else visible
            assert _close(ours[seen], theirs[0][seen])
            assert pooled or not ours[~visible].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_embedding", "max_embedding"])
def test_padding_on_either_side_enters_no_embedding(name: str, tmp_path: Path) -> None:
    bundle, reference = _compile(ENCODERS[name], tmp_path, "arbitrary")
    holes = np.random.default_rng(1).random(41) < 0.6
    with slmtvm.load(bundle) as session:
        for mask in (np.arange(41) >= 6, np.arange(41) < 30, holes):
            want = reference.run(TOKENS, ENCODERS[name].outputs, mask=mask)[0][0]
            got = session.encode(TOKENS, mask)
            assert got.shape == (DIM,)
            assert _close(got, want)
        np.testing.assert_array_equal(session.encode(TOKENS, holes), session.encode(TOKENS, holes))


@pytest.mark.slow
def test_no_number_of_threads_and_no_bucket_changes_a_bit_of_a_mean(tmp_path: Path) -> None:
    path = save_head(ENCODERS["tokens_and_embedding"], tmp_path)
    found = []
    for context in (17, 64):  # 17 tokens fill the one, and stand in a bucket of the other
        bundle = tmp_path / f"{context}.slm"
        compile_model(path, output=bundle, context=context)
        for threads in (1, 3):
            with slmtvm.load(bundle, threads=threads) as session:
                found.append(session.outputs(TOKENS[:17])["sentence_embedding"])
    assert all(np.array_equal(row, found[0]) for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last_logits", "score_of_last_not_padding"])
def test_a_decoder_scores_its_last_token_however_a_text_is_divided(
    name: str, tmp_path: Path
) -> None:
    bundle, reference = _compile(DECODERS[name], tmp_path)
    want = reference.run(TOKENS, ["logits"])[0].reshape(-1)
    with slmtvm.load(bundle) as session:
        whole = session.eval(TOKENS)
        assert _close(whole, want)
        session.reset()
        session.eval(TOKENS[:9])
        session.eval(TOKENS[9:30])
        np.testing.assert_array_equal(session.outputs(TOKENS[30:])["logits"], whole)
        if name == "last_logits":
            assert session.sample() == int(whole.argmax())
        else:
            assert whole.shape == (LABELS,)
            with pytest.raises(DeviceError, match="no logit for each of 61 tokens"):
                session.sample()


@pytest.mark.slow
def test_a_decoder_gives_several_outputs_after_its_last_token(tmp_path: Path) -> None:
    bundle, reference = _compile(DECODERS["logits_and_value"], tmp_path)
    logits, value = reference.run(TOKENS, ["logits", "value"])
    with slmtvm.load(bundle) as session:
        rows = session.eval_all(TOKENS)
        assert _close(rows, logits[0])
        session.reset()
        got = session.outputs(TOKENS)
        assert _close(got["logits"], logits[0, -1])
        np.testing.assert_array_equal(got["logits"], rows[-1])
        assert np.abs(got["value"] - value[0, -1]).max() <= RANGE * np.ptp(value)
        session.reset()
        for token in TOKENS:
            last = session.outputs([token])
        np.testing.assert_array_equal(last["value"], got["value"])


@pytest.mark.slow
def test_a_text_that_both_halves_of_a_classifier_read_must_end(tmp_path: Path) -> None:
    bundle, reference = _compile(BOTH_HALVES["classifier_that_wraps_around"], tmp_path)
    tokens = TOKENS.copy()
    tokens[[16, -1]] = END
    visible = np.arange(41) <= 16
    with slmtvm.load(bundle) as session:
        assert session.info["final_token"] == END
        for count in (17, 41):
            want = reference.run(tokens[:count], ["logits"])[0][0]
            assert _close(session.encode(tokens[:count]), want)
        np.testing.assert_array_equal(session.encode(tokens, visible), session.encode(tokens[:17]))
        with pytest.raises(DeviceError, match="takes its row at an end token: end the sequence"):
            session.encode(TOKENS[:5])


@pytest.mark.slow
def test_a_mean_of_rows_that_see_only_earlier_ones_has_the_same_bits_everywhere(
    tmp_path: Path,
) -> None:
    path = save_head(CAUSAL_ENCODERS["tokens_and_embedding"], tmp_path)
    reference, found = Reference(path), []
    for context in (17, 64):
        bundle = tmp_path / f"{context}.slm"
        compile_model(path, output=bundle, context=context)
        for threads in (1, 3):
            with slmtvm.load(bundle, threads=threads) as session:
                outputs = session.outputs(TOKENS[:17])
                found.append(outputs["sentence_embedding"])
                want = reference.run(TOKENS[:17], [*outputs])
                assert all(_close(o, w[0]) for o, w in zip(outputs.values(), want, strict=True))
    assert all(np.array_equal(row, found[0]) for row in found)


@pytest.mark.slow
def test_there_is_no_output_before_a_model_has_run(tmp_path: Path) -> None:
    bundle, _ = _compile(ENCODERS["classifier"], tmp_path)
    with slmtvm.load(bundle) as session:
        call, handle = session.model.library.call, session._handle
        assert call("slm_output_count") == 1
        with pytest.raises(DeviceError, match="no output yet: run the model with slm_encode"):
            call("slm_output_get", handle, 0, None)
        with pytest.raises(DeviceError, match="output 1, must be 0 to 0"):
            call("slm_output_get", handle, 1, None)
        session.encode(TOKENS)
        assert call("slm_output_get", handle, 0, None) == 1


@pytest.mark.slow
def test_segments_say_of_which_text_a_token_is(tmp_path: Path) -> None:
    path = save_head(ENCODERS["classifier"], tmp_path, types="table")
    compile_model(path, output=tmp_path / "x.slm")
    second = (np.arange(41) >= 20).astype(np.int64)
    visible = np.arange(41) < 33
    reference = Reference(path)
    with slmtvm.load(tmp_path / "x.slm") as session:
        assert session.info["segments"] == 2
        for mask in (None, visible):
            want = reference.run(TOKENS, ["logits"], mask=mask, segments=second)[0][0]
            assert _close(session.encode(TOKENS, mask, second), want)
        assert _close(session.encode(TOKENS), reference.run(TOKENS, ["logits"])[0][0])
        with pytest.raises(DeviceError, match="the segment of token 3 is 2, must be 0 to 1"):
            session.encode(TOKENS, segments=[0, 0, 0, 2, *[0] * 37])
        with pytest.raises(DeviceError, match="2 segments for 41 tokens"):
            session.encode(TOKENS, segments=[0, 1])
