"""The demo model's forms are real, complete and small."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import FORMS, PROMPTS, heldout_ids, model_path, prompt_ids
from tests.models.forms import ASSETS, NO_CACHE
from tests.models.pycode import DEMO, TOKENIZER
from tests.models.weights import compress, decompress

MOST_ASSET_BYTES = 11_000_000


def test_the_shipped_files_stay_small() -> None:
    files = [path for folder in (DEMO, ASSETS) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < MOST_ASSET_BYTES


def test_the_heldout_text_has_the_tokens_of_its_protocol() -> None:
    ids = heldout_ids()
    assert len(ids) == 215 * 256 + 1
    assert ids[0] == 0  # <|endoftext|>


def test_every_prompt_ends_at_a_colon() -> None:
    assert TOKENIZER.is_file()
    assert len(PROMPTS) == 5
    assert all(prompt.endswith(":") for prompt in PROMPTS)
    assert all(ids for ids in prompt_ids())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_valid_onnx_file_with_all_its_weights(form: str) -> None:
    model = onnx.load(model_path(form))
    onnx.checker.check_model(model)
    for tensor in model.graph.initializer:
        assert not tensor.doc_string, "a skeleton's mark is left"
        assert np.isfinite(numpy_helper.to_array(tensor).astype(np.float32)).all(), tensor.name


def test_a_skeleton_holds_no_weights() -> None:
    model = onnx.load(NO_CACHE)
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) < 1024


def test_compressed_weights_are_within_half_a_step() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((7, 33)).astype(np.float32)
    vector = np.linspace(0.5, 2, 33).astype(np.float16).astype(np.float32)
    restored = decompress(compress({"matrix": matrix, "vector": vector}))
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored["matrix"] - matrix) <= step * 0.501).all()
    assert np.array_equal(restored["vector"], vector)
