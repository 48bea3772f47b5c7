"""What tasks make of a model's numbers: a session that is none, with numbers that are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from slmtvm.errors import SlmError
from slmtvm.runtime import tasks

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "Ada", "Lovelace", "met", "Charles", "in", "London"]
CLS, SEP = 1, 2
FEATURES = 4


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )  # fmt: skip
    tokenizer.enable_padding(length=12)  # what a file may ask for, and no task wants
    tokenizer.enable_truncation(5)
    return tokenizer


class Numbers:
    """A session whose outputs are what a function makes of the tokens and their segments."""

    def __init__(self, outputs: dict[str, tuple[int, bool]], make: Callable[..., Any], **info: Any):
        self.info = {
            "kind": "encoder", "vocab_size": len(WORDS), "context": 12, "segments": 2, "task": {},
            "outputs": [
                {"name": n, "features": f, "pooled": pooled} for n, (f, pooled) in outputs.items()
            ],
            **info,
        }  # fmt: skip
        self.tokenizer = _tokenizer()
        self.seen: list[tuple[list[int], list[int] | None]] = []
        self._make = make

    def outputs(self, ids: list[int], segments: list[int] | None = None) -> dict[str, np.ndarray]:
        self.seen.append((list(ids), segments))
        made = self._make(ids)
        return {k: np.asarray(v, np.float32) for k, v in made.items()}


def _rows(by_word: dict[str, list[float]], other: list[float]) -> Callable[..., Any]:
    return lambda ids: {"logits": [by_word.get(WORDS[i], other) for i in ids]}


@pytest.mark.parametrize(
    ("outputs", "info", "task"),
    [
        ({"logits": (10, False)}, {"kind": "decoder"}, "generate"),
        ({"logits": (10, True)}, {"kind": "decoder"}, "generate"),
        ({"logits": (3, True)}, {"kind": "decoder"}, "classify"),
        ({"logits": (10, False)}, {"kind": "encoder-decoder"}, "generate"),
        ({"logits": (3, True)}, {}, "classify"),
        ({"output": (3, True)}, {"task": {"labels": ["a", "b", "c"]}}, "classify"),
        ({"logits": (10, False)}, {}, "fill"),
        ({"logits": (5, False)}, {}, "entities"),
        ({"start_logits": (1, False), "end_logits": (1, False)}, {}, "answer"),
        ({"sentence_embedding": (8, True)}, {}, "embed"),
        ({"last_hidden_state": (8, False), "pooler_output": (8, True)}, {}, "embed"),
        ({"last_hidden_state": (8, False)}, {"kind": "decoder"}, "embed"),
    ],
)
def test_the_outputs_say_what_a_model_is_for(
    outputs: dict[str, tuple[int, bool]], info: dict[str, Any], task: str
) -> None:
    assert tasks.task_of(Numbers(outputs, lambda ids: {}, **info).info) == task


def test_labels_are_probabilities_in_their_order_and_a_pair_has_two_segments() -> None:
    settings = {"labels": ["bad", "fine", "good"]}
    session = Numbers({"logits": (3, True)}, lambda ids: {"logits": [0, 1, 3]}, task=settings)
    labels = tasks.classify(session, "Ada met", "Charles")
    assert [label.label for label in labels] == ["good", "fine", "bad"]
    want = np.exp([3, 1, 0]) / np.exp([3, 1, 0]).sum()
    assert [label.score for label in labels] == pytest.approx(want)
    assert session.seen == [([CLS, 4, 6, SEP, 7, SEP], [0, 0, 0, 0, 1, 1])]


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own() -> None:
    session = Numbers(
        {"logits": (2, True)}, lambda ids: {"logits": [0, 2]}, task={"independent": True}
    )
    first, second = tasks.classify(session, "Ada")
    assert (first.label, first.score) == ("LABEL_1", pytest.approx(1 / (1 + np.exp(-2))))
    assert (second.label, second.score) == ("LABEL_0", pytest.approx(0.5))


def test_a_single_score_comes_out_as_it_is() -> None:
    session = Numbers({"logits": (1, True)}, lambda ids: {"logits": [-4.5]}, segments=0)
    (label,) = tasks.classify(session, "Ada", "met Charles")
    assert label.score == -4.5
    assert session.seen[0][1] is None  # the model tells no texts apart


def test_entities_join_neighbours_with_one_label() -> None:
    labels = ["O", "B-PER", "I-PER", "LOC"]
    rows = {"Ada": [0, 9, 0, 0], "Lovelace": [0, 0, 9, 0], "London": [0, 0, 0, 9.0]}
    rows["Charles"] = rows["Ada"]
    session = Numbers(
        {"logits": (FEATURES, False)}, _rows(rows, [9, 0, 0, 0]), task={"labels": labels}
    )
    text = "Ada Lovelace Charles met in London"
    found = tasks.entities(session, text)
    assert [(e.label, e.text) for e in found] == [
        ("PER", "Ada Lovelace"), ("PER", "Charles"), ("LOC", "London"),
    ]  # fmt: skip
    assert all(text[e.start : e.end] == e.text and 0.9 < e.score < 1 for e in found)


def _points(ids: list[int], words: tuple[str, str]) -> dict[str, Any]:
    """Start and end logits that point at words, and more at the first token."""
    rows = {}
    for name, word in zip(("start_logits", "end_logits"), words, strict=True):
        rows[name] = [[6.0 if WORDS[i] == word else 7.0 if i == CLS else 0.0] for i in ids]
    return rows


SPAN = {"start_logits": (1, False), "end_logits": (1, False)}


def test_an_answer_is_the_likeliest_span_of_the_text() -> None:
    session = Numbers(SPAN, lambda ids: _points(ids, ("Charles", "London")))
    found = tasks.answer(session, "London met", "Ada met Charles in London")
    assert (found.text, found.start, found.end) == ("Charles in London", 8, 25)
    assert 0 < found.score < 1
    backwards = Numbers(SPAN, lambda ids: _points(ids, ("London", "Charles")))
    assert tasks.answer(backwards, "met", "Charles in London").text in ("London", "Charles")


def test_an_answer_is_found_in_a_text_that_does_not_fit() -> None:
    session = Numbers(SPAN, lambda ids: _points(ids, ("London", "London")))
    text = " ".join(["Ada met"] * 9 + ["London"] + ["met"] * 5)
    found = tasks.answer(session, "met in", text)
    assert text[found.start : found.end] == found.text == "London"
    assert len(session.seen) > 1 and all(len(ids) <= 12 for ids, _ in session.seen)
    with pytest.raises(SlmError, match="no text fits the context of 12"):
        tasks.answer(session, " ".join(["met"] * 9), text)


def test_a_mask_is_filled_with_the_likeliest_words() -> None:
    rows = np.zeros((len(WORDS), len(WORDS)))
    rows[3, 9], rows[3, 7] = 5, 4
    session = Numbers({"logits": (10, False)}, lambda ids: {"logits": rows[ids]})
    ((first, second),) = tasks.fill(session, "Ada met in [MASK]", top=2)
    assert (first.text, second.text) == ("London", "Charles")
    assert first.score > second.score > 0
    with pytest.raises(SlmError, match=r"no mask to fill \(\[MASK\]\)"):
        tasks.fill(session, "Ada met in London")


ROWS = np.arange(len(WORDS) * 3, dtype=np.float32).reshape(-1, 3) ** 1.5


@pytest.mark.parametrize(
    ("pooling", "asked", "want"),
    [
        ("", "", "mean"), ("first", "", "first"), ("first", "max", "max"), ("", "last", "last"),
    ],
)  # fmt: skip
def test_rows_are_pooled_as_asked_or_as_the_settings_say(
    pooling: str, asked: str, want: str
) -> None:
    session = Numbers(
        {"last_hidden_state": (3, False), "pooler_output": (3, True)},
        lambda ids: {"last_hidden_state": ROWS[ids], "pooler_output": [0, 0, 0]},
        task={"pooling": pooling, "normalize": True},
    )
    rows = ROWS[[CLS, 4, 6, SEP]]
    pooled = {"mean": rows.mean(0), "first": rows[0], "last": rows[-1], "max": rows.max(0)}[want]
    found = tasks.embed(session, "Ada met", pooling=asked)
    np.testing.assert_allclose(found.values, pooled / np.linalg.norm(pooled), rtol=1e-6)
    assert found.pooling == want
    plain = tasks.embed(session, "Ada met", pooling=asked, normalize=False)
    np.testing.assert_allclose(plain.values, pooled, rtol=1e-6)


def test_an_embedding_of_the_graph_is_taken_as_it_is() -> None:
    outputs = {"token_embeddings": (3, False), "sentence_embedding": (2, True)}
    session = Numbers(outputs, lambda ids: {"sentence_embedding": [3, 4]})
    found = tasks.embed(session, "Ada")
    assert found.values.tolist() == [3, 4] and found.pooling == ""
    assert tasks.embed(session, "Ada", normalize=True).values.tolist() == pytest.approx([0.6, 0.8])


def test_a_text_that_cannot_be_run_is_an_error() -> None:
    session = Numbers({"logits": (3, True)}, lambda ids: {"logits": [0, 0, 0]})
    with pytest.raises(SlmError, match="14 tokens, which do not fit the context of 12"):
        tasks.classify(session, " ".join(["met"] * 12))
    with pytest.raises(SlmError, match="no valid text"):
        tasks.classify(session, "\udcff")
