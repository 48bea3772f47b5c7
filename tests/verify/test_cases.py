"""Windows of tokens: which are compared, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slmtvm.errors import SlmError
from slmtvm.verify.cases import make_cases

INFO: dict[str, Any] = {"kind": "decoder", "context": 16, "vocab_size": 50, "source_context": 6}


def test_rows_of_tokens_are_cut_each_by_itself() -> None:
    rows = np.arange(40).reshape(2, 20)
    cases = make_cases(rows, INFO, 8)
    assert [case.tokens.tolist() for case in cases] == [
        list(range(first, first + 8)) for first in (0, 8, 20, 28)
    ]
    assert [case.following[-1] for case in cases] == [8, 16, 28, 36]


def test_an_encoders_rows_are_taken_to_the_end() -> None:
    cases = make_cases(np.arange(20), {**INFO, "kind": "encoder"}, 16)
    assert [len(case.tokens) for case in cases] == [16, 4]


def test_a_window_is_no_longer_than_the_source_that_it_is() -> None:
    cases = make_cases(np.arange(20), {**INFO, "kind": "encoder-decoder"}, 16)
    assert {len(case.tokens) for case in cases} == {6}


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([3, 50], {}, "token 50 is out of the vocabulary, which has 0 to 49"),
        ([3, -1], {}, "token -1 is out of the vocabulary"),
        ([3, 2**40], {}, "token 1099511627776 is out"),
        ([3], {}, "at least 2 tokens, the text has 1"),
        ([], {}, "at least 2 tokens, the text has 0"),
        ([0.5, 1.5], {}, "whole numbers"),
        ([[[1, 2]]], {}, "whole numbers"),
        ([1, 2], {"window": 0}, "window: must be at least 1, not 0"),
        ([1, 2], {"windows": 0}, "windows: must be at least 1, not 0"),
        ([1, 2], {"windows": -3}, "windows: must be at least 1, not -3"),
    ],
)
def test_what_cannot_be_compared_on_is_refused(
    tokens: list[Any], options: dict[str, int], words: str
) -> None:
    with pytest.raises(SlmError, match=words):
        make_cases(np.asarray(tokens), INFO, **{"window": 8, **options})


def test_an_encoder_needs_one_token() -> None:
    with pytest.raises(SlmError, match="at least 1 token,"):
        make_cases([], {**INFO, "kind": "encoder"}, 8)
