"""What a file makes of hidden tokens is found, and is what onnxruntime makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx, import_with_mask
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import encode_source, evaluate
from slmtvm.verify import Reference
from tests.models.corpus import corpus_path

CONTEXT = 61
TOKENS = 23  # longer than every window of the corpus
KINDS = {
    "bert-dynamo-masked": "keys",
    "bert-optimum": "keys",
    "bert-optimum-qdq-u8s8-matmul": "keys",
    "bloom-dynamo-masked": "skip",  # ALiBi of the visible tokens before
    "bloom-optimum": "skip",
    "bloom-script-masked": "skip",
    "gemma2-optimum": "keys",
    "gemma2-script-masked": "keys",  # windows that count hidden tokens
    "gpt-neox-optimum": "skip",
    "gpt-neox-script-masked": "keys",
    "gpt2-dynamo-masked": "keys",
    "gpt2-optimum-past": "skip",
    "gpt2-script-masked": "keys",
    "llama-dynamo-opset23": "keys",
    "llama-optimum-merged": "skip",
    "llama-optimum-past": "skip",  # position_ids
    "llama-script-masked": "keys",
    "minilm-script-masked": "keys",
    "mistral-dynamo-masked": "keys",
    "mistral-script-masked": "keys",
    "mixtral-script-masked": "keys",
    "mpnet-optimum": "keys",  # positions count tokens that are not padding, biases count all
    "opt-optimum": "skip",
    "opt-script-masked": "skip",  # positions count what the mask shows
    "qwen3-optimum-past": "skip",
    "roberta-optimum": "skip",  # hidden tokens are padding, which positions do not count
    "roberta-script-masked": "skip",
}
SOURCES = {"t5-optimum": "decoder_model.onnx", "t5-dynamo-masked": "model.onnx"}
REFUSED = {
    "llama-dynamo": "no input is a mask",
    "llama-builder-int4": "GroupQueryAttention.*how many tokens are visible",
    "lfm2-moe-builder-fp32": "CausalConvWithState.*convolution over neighbouring tokens",
    "mistral-optimum-past": "other keys are visible.*by position, differ",
    "bert-script-masked-fused": "does not take all weight from hidden keys",  # takes a length
    "bert-optimum-dynamic-u8": "dynamic quantization takes its range over all tokens",
}


def _masks() -> dict[str, np.ndarray]:
    holes = np.random.default_rng(1).random(TOKENS) < 0.6
    holes[[0, TOKENS - 1]] = False, True
    left, right = np.ones((2, TOKENS), bool)
    left[:5] = right[-8:] = False
    return {"left": left, "right": right, "holes": holes}


def _tokens(model: CanonicalModel, mask: np.ndarray) -> np.ndarray:
    """Random ones; where positions do not count padding, hidden tokens are that."""
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, len(mask))
    pads = model.mask == "skip" and model.padding
    return np.where(mask, tokens, model.padding[0]) if pads else tokens


@pytest.mark.parametrize("cell", KINDS)
def test_a_masked_sequence_computes_what_onnxruntime_computes(cell: str) -> None:
    path = corpus_path(cell)
    model = import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert model.mask == KINDS[cell]
    reference = Reference(path)
    for mask in _masks().values():
        tokens = _tokens(model, mask)
        ours, theirs = evaluate(model, tokens, mask=mask), reference.rows(tokens, mask=mask)
        assert np.abs(ours - theirs)[mask].max() < 2e-4 * np.ptp(theirs[mask])
        assert not ours[~mask].any()


@pytest.mark.parametrize("cell", SOURCES)
def test_a_masked_source_computes_what_onnxruntime_computes(cell: str) -> None:
    path = corpus_path(cell, SOURCES[cell])
    model = import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert model.mask == "keys"
    reference = Reference(path)
    text = np.random.default_rng(2).integers(3, model.vocab_size, 9)
    for mask in _masks().values():
        source = _tokens(model, mask)
        ours = evaluate(model, text, source, mask=mask)
        theirs = reference.rows(text, source, mask)
        assert np.abs(ours - theirs).max() < 2e-4 * np.ptp(theirs)
        assert not encode_source(model, source, mask=mask)[~mask].any()


@pytest.mark.parametrize("cell", REFUSED)
def test_a_file_whose_masks_cannot_be_compiled_is_refused_with_the_reason(cell: str) -> None:
    path = corpus_path(cell)
    with pytest.raises(UnsupportedOpError, match=REFUSED[cell]) as caught:
        import_onnx(path, context=CONTEXT, mask="arbitrary")
    assert str(path) in str(caught.value)
    model, reason = import_with_mask(path, context=CONTEXT)
    assert model.mask == "none"
    assert reason == str(caught.value)


def test_a_window_that_no_sequence_reaches_does_not_matter() -> None:
    # Its window counts hidden tokens and its positions do not: only without a window it is one.
    path = corpus_path("mistral-optimum-past")
    assert import_onnx(path, context=8, mask="arbitrary").mask == "skip"


def test_without_the_option_nothing_is_asked_of_the_mask() -> None:
    model = import_onnx(corpus_path("lfm2-moe-builder-fp32"), context=CONTEXT)
    assert model.mask == "none"
    with pytest.raises(SlmError, match="must be one of none, arbitrary, not 'any'"):
        import_onnx(corpus_path("llama-script-masked"), mask="any")
