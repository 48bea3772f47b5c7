"""The encoder of the slow tests is the sentence model that it says it is."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from tests.models.encoder import ENCODER_FORMS, encoder_path

# wordpiece ids of "a cat sits on the mat", "the cat is sitting on a mat", "stock prices fell today"
_CAT = (101, 1037, 4937, 7719, 2006, 1996, 13523, 102)
_SAME_CAT = (101, 1996, 4937, 2003, 3564, 2006, 1037, 13523, 102)
_STOCKS = (101, 4518, 7597, 3062, 2651, 102)


def _sentence(session: onnxruntime.InferenceSession, ids: tuple[int, ...]) -> np.ndarray:
    tokens = np.array([ids], np.int64)
    feed = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }
    mean = session.run(None, feed)[0][0].mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.mark.slow
@pytest.mark.parametrize("form", ENCODER_FORMS)
def test_sentences_of_one_meaning_lie_closer_than_others(form: str) -> None:
    path = encoder_path(form)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    cat, same, stocks = (_sentence(session, ids) for ids in (_CAT, _SAME_CAT, _STOCKS))
    assert cat @ same > 0.8
    assert cat @ stocks < 0.3
