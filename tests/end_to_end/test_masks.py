"""Bundles that take masks, against onnxruntime under the same masks, and against their own bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.compiler import compile_model
from slmtvm.runtime import Session
from slmtvm.verify import Reference
from tests.models.corpus import corpus_path

CONTEXT = 190  # a chunk of 128 and some
ENCODER_CONTEXT = 61
TOKENS = 150
RANGE = 2e-4  # of the logits' range: the largest difference from onnxruntime
DECODERS = {
    "gemma2-script-masked": "keys",  # windows, capped scores
    "llama-script-masked": "keys",
    "mistral-script-masked": "keys",
    "bloom-optimum": "skip",
    "qwen3-optimum-past": "skip",
}


def _masks(count: int) -> dict[str, np.ndarray]:
    """Left-padded beyond a chunk, and with holes; the last token is visible."""
    holes = np.random.default_rng(1).random(count) < 0.6
    holes[-1] = True
    return {"left": np.arange(count) >= count - 15, "holes": holes}


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 60, count)


def _compile(
    cell: str, folder: Path, mask: str, name: str = "model.onnx", context: int = CONTEXT
) -> Path:
    path = folder / f"{cell}-{mask}.slm"
    compile_model(
        corpus_path(cell, name), output=path, context=context, kv="f32", activations="file",
        mask=mask,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile(request.param, tmp_path_factory.mktemp("masks"), "arbitrary")


def _cell(bundle: Path) -> str:
    return bundle.name.removesuffix("-arbitrary.slm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["left", "holes"])
def test_visible_rows_are_those_of_onnxruntime(decoder: Path, name: str) -> None:
    tokens, mask = _tokens(TOKENS), _masks(TOKENS)[name]
    theirs = Reference(corpus_path(_cell(decoder))).rows(tokens, mask=mask)
    with slmtvm.load(decoder) as session:
        assert session.info["mask"] == DECODERS[_cell(decoder)]
        ours = session.eval_all(tokens, mask)
    assert np.abs(ours - theirs)[mask].max() < RANGE * np.ptp(theirs[mask])
    assert not ours[~mask].any()


@pytest.mark.slow
def test_a_masked_prompt_gives_the_same_bits_in_chunks_singly_and_on_threads(
    decoder: Path,
) -> None:
    tokens, mask = _tokens(TOKENS), _masks(TOKENS)["holes"]
    with slmtvm.load(decoder, threads=1) as session:
        want = session.eval_all(tokens, mask)
        session.reset()
        singly = [session.eval_all(tokens[i : i + 1], mask[i : i + 1]) for i in range(TOKENS)]
        session.reset()
        half = session.eval_all(tokens[:70], mask[:70])
        rest = session.eval_all(tokens[70:], mask[70:])
    np.testing.assert_array_equal(np.concatenate(singly), want)
    np.testing.assert_array_equal(np.concatenate([half, rest]), want)
    with slmtvm.load(decoder, threads=3, all_threads=True) as session:
        np.testing.assert_array_equal(session.eval_all(tokens, mask), want)


@pytest.mark.slow
def test_seeking_back_and_masking_otherwise_equals_a_fresh_run(decoder: Path) -> None:
    tokens, masks = _tokens(TOKENS), _masks(TOKENS)
    with slmtvm.load(decoder) as session:
        session.eval_all(tokens, masks["left"])
        session.reset()
        again = session.eval_all(tokens, masks["holes"])
    with slmtvm.load(decoder) as session:
        np.testing.assert_array_equal(session.eval_all(tokens, masks["holes"]), again)


@pytest.mark.slow
def test_where_all_is_visible_no_bit_differs_from_a_bundle_without_the_option(
    decoder: Path, tmp_path: Path
) -> None:
    tokens = _tokens(TOKENS)
    with slmtvm.load(_compile(_cell(decoder), tmp_path, "none")) as session:
        prompt, step = session.eval_all(tokens), session.eval(tokens[:1])
    for mask in (None, np.ones(TOKENS)):
        with slmtvm.load(decoder) as session:
            np.testing.assert_array_equal(session.eval_all(tokens, mask), prompt)
            np.testing.assert_array_equal(session.eval(tokens[:1]), step)


def _greedy(reference: Reference, prompt: np.ndarray, mask: np.ndarray, count: int) -> list[int]:
    tokens = prompt
    for _ in range(count):
        shown = np.append(mask, np.ones(len(tokens) - len(mask)))
        token = int(reference.rows(tokens, mask=shown)[-1].argmax())
        tokens = np.append(tokens, token)
    return tokens[len(prompt) :].tolist()


@pytest.mark.slow
def test_generation_goes_on_after_a_left_padded_prompt(decoder: Path) -> None:
    prompt, mask = _tokens(40), _masks(40)["left"]
    with slmtvm.load(decoder) as session:
        ours = list(session.generate(prompt, 12, mask=mask))
    assert ours == _greedy(Reference(corpus_path(_cell(decoder))), prompt, mask, 12)


def _encode(session: Session, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    session.encode(tokens)  # what it leaves behind must not matter
    return session.encode(tokens, mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "kind"),
    [("bert-optimum", "keys"), ("mpnet-optimum", "keys"), ("roberta-optimum", "skip")],
)
def test_an_encoder_sees_visible_tokens_alone(cell: str, kind: str, tmp_path: Path) -> None:
    count, reference = 45, Reference(corpus_path(cell))
    bundle = _compile(cell, tmp_path, "arbitrary", context=ENCODER_CONTEXT)
    with slmtvm.load(bundle, threads=2, all_threads=True) as session:
        assert session.info["mask"] == kind
        for mask in _masks(count).values():
            tokens = _tokens(count)
            if kind == "skip":  # positions do not count padding
                tokens[~mask] = session.info["padding"][0]
            ours, theirs = _encode(session, tokens, mask), reference.rows(tokens, mask=mask)
            assert np.abs(ours - theirs)[mask].max() < RANGE * np.ptp(theirs[mask])
            assert not ours[~mask].any()


@pytest.mark.slow
def test_an_encoder_without_the_option_takes_its_valid_length_as_a_mask(tmp_path: Path) -> None:
    cell, count = "bert-script-masked-fused", 33  # which takes a length alone
    mask = np.arange(count) < 20
    tokens = _tokens(count)
    theirs = Reference(corpus_path(cell)).rows(tokens, mask=mask)
    with slmtvm.load(_compile(cell, tmp_path, "none", context=ENCODER_CONTEXT)) as session:
        ours = session.encode(tokens, mask)
    assert np.abs(ours - theirs)[mask].max() < RANGE * np.ptp(theirs[mask])


@pytest.mark.slow
def test_an_encoder_decoder_attends_to_visible_tokens_of_its_source(tmp_path: Path) -> None:
    cell, name, count = "t5-optimum", "decoder_model.onnx", 37
    source, text = _tokens(count), _tokens(20)
    reference = Reference(corpus_path(cell, name))
    with slmtvm.load(
        _compile(cell, tmp_path, "arbitrary", name), threads=2, all_threads=True
    ) as session:
        assert session.info["mask"] == "keys"
        for mask in _masks(count).values():
            session.encode(source, mask)
            whole = session.eval_all(text)
            session.reset()
            single = np.stack([session.eval([int(t)]) for t in text])
            theirs = reference.rows(text, source, mask)
            assert np.abs(whole - theirs).max() < RANGE * np.ptp(theirs)
            np.testing.assert_array_equal(single, whole)
            with pytest.raises(slmtvm.DeviceError, match="only its source"):
                session.eval(text[:2], [0, 1])
        session.encode(source)  # another source: nothing of it is hidden
        theirs = reference.rows(text, source)
        assert np.abs(session.eval_all(text) - theirs).max() < RANGE * np.ptp(theirs)
