"""Verification measures what it says: known errors in, known numbers out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import ClassVar

import numpy as np
import pytest

from slmtvm.errors import SlmError
from slmtvm.verify import Limits, Reference, VerifyReport, compare, compare_greedy
from slmtvm.verify.metrics import HiddenDifference, LogitsDifference
from tests.models import FORMS, heldout_ids, model_path, prompt_ids
from tests.models.corpus import corpus_path
from tests.verify.sessions import ReferenceSession

# Perplexity on the held-out text by the demo model's protocol; float32 from the original weights,
# which the form rounds to int8.
PROTOCOL_PERPLEXITY = {"float32": 15.0917, "demo": 15.4146}
# The most that onnxruntime's quantizers add to the perplexity of any form.
MOST_QUANTIZATION_LOSS = 1.04


@cache
def _reference(form: str = "demo") -> Reference:
    return Reference(model_path(form), threads=2)


def test_equal_logits_give_no_difference() -> None:
    report = compare(ReferenceSession(_reference()), _reference(), heldout_ids()[:600])
    assert (report.max_abs, report.mean_abs, report.kl_mean, report.top1) == (0, 0, 0, 1)
    assert report.ppl == report.ppl_reference
    assert report.tokens == 512


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    session = ReferenceSession(_reference(), distort=lambda rows: rows + np.float32(0.5))
    report = compare(session, _reference(), heldout_ids()[:100])
    assert report.max_abs == pytest.approx(0.5, abs=1e-5)
    assert report.mean_abs == pytest.approx(0.5, abs=1e-5)
    assert report.kl_mean == pytest.approx(0, abs=1e-9)
    assert report.top1 == 1


def test_a_distorted_model_is_seen_in_every_number() -> None:
    session = ReferenceSession(_reference(), distort=lambda rows: -rows)
    report = compare(session, _reference(), heldout_ids()[:100])
    assert report.kl_mean is not None and report.kl_mean > 1
    assert report.top1 == 0
    assert report.ppl is not None and report.ppl_reference is not None
    assert report.ppl > 2 * report.ppl_reference
    assert not report.agrees()


def test_kl_and_perplexity_are_those_of_two_known_distributions() -> None:
    ours, theirs = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    total = LogitsDifference()
    total.add_logits(ours.astype(np.float32), theirs.astype(np.float32), np.array([2]))
    assert total.sum_kl == pytest.approx(0.25 * np.log(0.5) + 0.5 * np.log(2), rel=1e-6)
    assert np.exp(total.nll) == pytest.approx(4, rel=1e-6)
    assert np.exp(total.nll_reference) == pytest.approx(2, rel=1e-6)
    assert total.same_top1 == 0


def test_hidden_states_are_compared_by_angle() -> None:
    total = HiddenDifference()
    total.add_hidden(np.array([[1, 0], [0, 2]], np.float32), np.array([[1, 1], [0, 1]], np.float32))
    assert total.sum_cosine == pytest.approx(1 / np.sqrt(2) + 1)
    assert total.max_abs == 1


def test_random_tokens_are_compared_where_no_text_is_given() -> None:
    report = compare(ReferenceSession(_reference()), _reference())
    assert report.tokens == 256
    assert (report.ppl, report.ppl_reference) == (None, None)


def test_an_encoder_is_compared_without_probabilities() -> None:
    session = ReferenceSession(_reference(), kind="encoder", distort=lambda rows: rows * 1.1)
    report = compare(session, _reference(), heldout_ids()[:300])
    assert report.tokens == 300
    assert report.cosine == pytest.approx(1)
    assert 0.05 < report.relative < 0.1  # of the range: the largest value is over half of it
    assert list(report.to_json()) == [
        "tokens", "max_abs", "mean_abs", "relative", "cosine", "rounded_layers",
    ]  # fmt: skip
    assert report.agrees(Limits(max_kl=0))
    assert not report.agrees(Limits(max_relative=0.05))


@pytest.mark.parametrize(
    ("cell", "kind"), [("llama-script-masked", "decoder"), ("bert-optimum", "encoder")]
)
def test_a_bundle_that_takes_masks_is_compared_under_some(cell: str, kind: str) -> None:
    reference = Reference(corpus_path(cell))
    session = ReferenceSession(reference, kind=kind, mask="keys", vocab_size=60, context=40)
    report = compare(session, reference)
    assert report.masked is not None and report.masked.max_abs == 0
    assert 60 < report.masked.tokens < 120  # of three windows of 40, those that are visible
    assert report.agrees(Limits(1e-9, 0.999))
    assert "masked" in report.to_json() and "under masks" in str(report)


def test_where_positions_leave_out_padding_it_hides_the_source_alone() -> None:
    class Reader(ReferenceSession):
        sources: ClassVar[list[tuple[np.ndarray, ...]]] = []
        texts: ClassVar[list[np.ndarray]] = []

        def encode(self, *given: np.ndarray) -> np.ndarray:
            self.sources.append(given)
            return np.zeros(0)

        def eval_all(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            self.texts.append(tokens)
            return self._reference.rows(tokens, *self.sources[-1])

    reference = Reference(corpus_path("t5-optimum", "decoder_model.onnx"))
    session = Reader(reference, kind="encoder-decoder", mask="skip", vocab_size=60, context=40)
    session.info |= {"source_context": 40, "padding": [7]}
    report = compare(session, reference)
    assert report.masked is not None and report.masked.max_abs == 0
    assert not any((text == 7).any() for text in session.texts)
    masked = [given for given in session.sources if len(given) == 2]
    assert masked and all(((tokens == 7) == ~mask).all() for tokens, mask in masked)


def test_a_bundle_that_does_not_mask_as_the_file_does_disagrees() -> None:
    class Unmasked(ReferenceSession):
        def _masked(self, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
            return super()._masked(tokens, None)

    reference = Reference(corpus_path("llama-script-masked"))
    report = compare(Unmasked(reference, mask="keys", vocab_size=60, context=40), reference)
    assert report.max_abs == 0 and report.masked is not None and report.masked.max_abs > 0
    assert not report.agrees(Limits(1e-9, 0.999))


def test_a_window_never_exceeds_the_context_of_the_bundle() -> None:
    session = ReferenceSession(_reference(), context=32)
    report = compare(session, _reference(), heldout_ids()[:100])
    assert report.tokens == 96


@pytest.mark.parametrize(("count", "compared"), [(2, 1), (10, 9), (257, 256), (512, 256)])
def test_a_text_is_cut_into_whole_windows(count: int, compared: int) -> None:
    report = compare(ReferenceSession(_reference()), _reference(), heldout_ids()[:count])
    assert report.tokens == compared


@pytest.mark.slow
def test_a_bundle_of_longer_sequences_is_compared_on_such_alone() -> None:
    class Counting(Reference):
        lengths: ClassVar[list[int]] = []

        def rows(self, tokens, source=None, mask=None):
            self.lengths.append(len(tokens))
            return super().rows(tokens, source, mask)

    reference = Counting(model_path("demo"), threads=2)
    session = ReferenceSession(_reference(), context=400)
    session.info["exact_from"] = 300
    assert compare(session, reference).tokens == 300  # random ones, more than usual
    assert compare(session, reference, heldout_ids()[:700]).tokens == 600
    assert reference.lengths == [300, 300, 300]
    with pytest.raises(SlmError, match="at least 301 tokens"):
        compare(session, reference, heldout_ids()[:300])


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(SlmError, match="at least 2 tokens"):
        compare(ReferenceSession(_reference()), _reference(), [5])


def test_a_bundle_of_another_model_is_an_error() -> None:
    session = ReferenceSession(_reference(), distort=lambda rows: rows[:, :100])
    with pytest.raises(SlmError, match="compiled from another file"):
        compare(session, _reference(), heldout_ids()[:20])


def test_the_json_has_the_documented_keys() -> None:
    report = compare(ReferenceSession(_reference()), _reference(), heldout_ids()[:20])
    table = json.loads(json.dumps(report.to_json()))
    assert list(table) == [
        "tokens", "max_abs", "mean_abs", "relative", "cosine", "rounded_layers", "kl_mean", "top1",
        "ppl", "ppl_reference",
    ]  # fmt: skip


def test_not_a_number_never_agrees() -> None:
    nan = float("nan")
    good = VerifyReport(1, 0.0, 0.0, relative=0.0, cosine=1.0, kl_mean=0.0)
    assert good.agrees()
    for name in ("relative", "cosine", "kl_mean"):
        bad = replace(good, **{name: nan}, own=good)
        assert not bad.agrees(Limits(max_kl=1e9, min_cosine=-1, max_relative=1e9))
        text = json.dumps(bad.to_json(), allow_nan=False)
        assert json.loads(text)[name] is None


def test_greedy_tokens_of_the_same_model_never_part() -> None:
    result = compare_greedy(ReferenceSession(_reference()), _reference(), prompt_ids()[0], 12)
    assert (result.agreed, result.gap) == (12, None)
    assert len(result.tokens) == 12


def test_greedy_comparison_tells_where_tokens_part_and_by_how_much() -> None:
    best_loses = _reference().rows(prompt_ids()[0])[-1]
    first, second = np.argsort(best_loses)[::-1][:2]

    def swap(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[:, [first, second]] = rows[:, [second, first]]
        return rows

    session = ReferenceSession(_reference(), distort=swap)
    result = compare_greedy(session, _reference(), prompt_ids()[0], 4)
    assert result.agreed == 0
    assert result.tokens[0] == second
    assert result.gap == pytest.approx(float(best_loses[first] - best_loses[second]))


def _perplexity(form: str, tokens: np.ndarray) -> float:
    reference = _reference(form)
    report = compare(ReferenceSession(reference), reference, tokens)
    assert report.tokens == len(tokens) - 1
    assert report.ppl_reference is not None
    return report.ppl_reference


@pytest.mark.slow
@pytest.mark.exhaustive  # the whole text
@pytest.mark.parametrize("form", PROTOCOL_PERPLEXITY)
def test_perplexity_by_the_protocol_is_that_of_the_trained_model(form: str) -> None:
    measured = _perplexity(form, heldout_ids())
    assert measured == pytest.approx(PROTOCOL_PERPLEXITY[form], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_predicts_python_as_well_as_the_trained_model(form: str) -> None:
    tokens = heldout_ids()[-6 * 256 - 1 :]
    assert _perplexity(form, tokens) < MOST_QUANTIZATION_LOSS * _perplexity("float32", tokens)
