"""What a calibration text says that a cache of few features must keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.ir.model import CanonicalModel, KvSpec
from slmtvm.ir.reference import evaluate
from slmtvm.low_rank import low_rank, parse_kv
from slmtvm.low_rank.allocate import allocated, step_of
from tests.passes.toy import CONTEXT, DIM, HEAD_DIM, KV_HEADS, VOCAB, Layer, decoder

RANK = 8
RNG = np.random.default_rng(5)
WINDOWS = [RNG.integers(0, VOCAB, 32) for _ in range(12)]
TOKENS = RNG.integers(0, VOCAB, CONTEXT)


def of_rank(layer: Layer, kinds: str, ranks: tuple[int, int] = (RANK, RANK)) -> CanonicalModel:
    """A decoder of two layers whose keys or values, as ``kinds`` says, have no more than ``ranks``
    features a head."""
    model = decoder("f32", variants=[layer] * 2)
    params = dict(model.params)
    named = {f"{i}.{kind}.weight": rank for i, rank in enumerate(ranks) for kind in kinds}
    for name, rank in named.items():
        mixed = RNG.standard_normal((KV_HEADS, HEAD_DIM, rank)) @ RNG.standard_normal(
            (KV_HEADS, rank, DIM)
        )
        params[name] = (0.1 * mixed).reshape(-1, DIM).astype(np.float32)
    return replace(model, params=params)


def test_what_has_few_features_loses_nothing() -> None:
    model = of_rank(Layer(q_base=0, k_base=0), "kv")
    made, report = low_rank(model, RANK, WINDOWS)
    want = evaluate(model, TOKENS)
    np.testing.assert_allclose(evaluate(made, TOKENS), want, atol=1e-3 * np.abs(want).max())
    assert all(max(la.scores, la.results) < 1e-2 for la in report.layers)
    assert report.ppl == pytest.approx(report.ppl_whole, rel=1e-3)
    assert [spec.head_dim for spec in made.kv] == [RANK, RANK]


def test_a_layer_that_needs_more_features_keeps_more() -> None:
    model = of_rank(Layer(q_base=0, k_base=0), "kv", (4, 12))
    made, report = low_rank(model, RANK, WINDOWS)
    assert [spec.head_dim for spec in made.kv] == [4, 12]
    assert report.kept == 0.5 and all(la.results < 1e-2 for la in report.layers)


@pytest.mark.parametrize(
    ("head_dim", "heads", "step"), [(64, 9, 16), (32, 8, 4), (128, 16, 16), (16, 4, 4), (7, 16, 2)]
)
def test_ranks_differ_by_what_keeps_rows_in_whole_lines(
    head_dim: int, heads: int, step: int
) -> None:
    assert step_of(head_dim, heads) == step


def test_a_rank_below_all_steps_is_every_layers() -> None:
    kv = (KvSpec(2, 16), KvSpec(2, 16))
    assert allocated(kv, 4, 3, lambda layer, left: 1 / left) == [3, 3]


def test_positions_that_no_window_reaches_count() -> None:
    """Keys turn: few features of those before the rotation are more after it, the more the further
    they turn."""
    model = of_rank(Layer(), "v")
    short = [window[:8] for window in WINDOWS * 4]
    made, _ = low_rank(model, 14, short)
    at_end = np.abs(evaluate(made, TOKENS) - evaluate(model, TOKENS))[-8:]
    shifted = replace(model, context=8)
    blind, _ = low_rank(shifted, 14, short)
    without = np.abs(evaluate(replace(blind, context=CONTEXT), TOKENS) - evaluate(model, TOKENS))
    assert at_end.mean() < without[-8:].mean()


def test_more_features_are_nearer_and_the_report_says_so() -> None:
    model = decoder("int4", variants=[Layer(norm="heads"), Layer(window=20)])
    reports = [low_rank(model, rank, WINDOWS)[1] for rank in (4, 8, 14)]
    lost = [sum(la.results for la in report.layers) for report in reports]
    assert sorted(lost, reverse=True) == lost and lost[0] > 2 * lost[2] > 0
    text = "\n".join(reports[0].lines())
    assert "rank 4 (of 16)" in text and "layer 1: rank 4, scores off by" in text
    assert reports[0].to_json()["layers"][1]["results"] == pytest.approx(
        reports[0].layers[1].results, abs=1e-4
    )


def test_rows_that_are_no_logits_have_no_perplexity() -> None:
    model = decoder("f32")
    _, report = low_rank(replace(model, vocab_size=VOCAB + 1), 8, WINDOWS)
    assert report.ppl is None and "perplexity" not in report.lines()[0]
    assert report.kept == 0.5 and "ppl" not in report.to_json()


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(SlmError, match="vocabulary of 112"):
        low_rank(decoder("f32"), 8, [np.array([1, VOCAB])])


@pytest.mark.parametrize("rank", [0, HEAD_DIM, 100])
def test_a_rank_that_no_head_has_is_refused(rank: int) -> None:
    with pytest.raises(SlmError, match="heads have 16 features; the rank is 1 or more"):
        low_rank(decoder("f32"), rank, WINDOWS)


def test_an_encoder_has_no_cache_to_project() -> None:
    with pytest.raises(UnsupportedOpError, match="leave rank:4 out of --kv"):
        low_rank(replace(decoder("f32"), kind="encoder"), 4, WINDOWS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, (None, 0)), ("int8", ("int8", 0)), ("rank:32", (None, 32)),
        ("rank:8,int4", ("int4", 8)),
    ],
)  # fmt: skip
def test_a_cache_is_named_by_its_rank_and_type(
    text: str | None, wanted: tuple[str | None, int]
) -> None:
    assert parse_kv(text) == wanted


@pytest.mark.parametrize("text", ["rank:", "rank:x", "rank:-4", "rank:0", "rank:1.5"])
def test_a_rank_is_a_number(text: str) -> None:
    with pytest.raises(SlmError, match="such as rank:32,int8"):
        parse_kv(text)
