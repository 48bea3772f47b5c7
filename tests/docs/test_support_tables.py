"""The tables that scripts/corpus_report.py writes: of heads, of pruned models, of all others."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus.page import BEGIN, BEGIN_HEADS, BEGIN_PRUNED, END, write_page

BASE, HEAD = "llama-optimum-past", "bert-optimum-span-qdq-u8s8"


def _outcome(cell: str, error: str = "", **more: object) -> dict[str, object]:
    numbers = {"difference": 1e-7, "single": None, "cosine": 1.0, "top1": 1.0}
    found = {
        "file": f"/corpus/{cell}/model.onnx", "error": error, "held": True, "own": 0.0,
        "evaluated": numbers, "compiled": {} if error else numbers, "padded": {},
        "speed": 2.0, "default": {}, "weight_bytes": 1, "file_bytes": 2,
    }  # fmt: skip
    return {**found, **more}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "import.md"
    path.write_text(f"a\n{BEGIN}\n\nold base\n{END}\nb\n{BEGIN_HEADS}\n\nold heads\n{END}\nc\n")
    return path


def test_a_run_over_heads_leaves_the_tables_of_other_models(page: Path) -> None:
    padded = {"left": None, "right": {"difference": 3e-7}}
    write_page(page, [_outcome(HEAD, padded=padded)], {"mpnet-optimum-span": "refused"})
    text = page.read_text()
    assert "old base" in text and "old heads" not in text
    assert "1 of 1 files pass" in text and "| span | bert |  |  |  | 1 |  |  |" in text
    assert "| span | static QDQ | 1 | all | 1.0e-07 |  | 3.0e-07 | 2.0 |  |" in text
    assert "`mpnet-optimum-span`: refused" in text
    assert [text.count(mark) for mark in (BEGIN, BEGIN_HEADS, END)] == [1, 1, 2]


def test_a_run_over_other_models_leaves_the_tables_of_heads(page: Path) -> None:
    write_page(page, [_outcome(BASE)], {"mpnet-optimum-span": "refused"})
    text = page.read_text()
    assert "old heads" in text and "old base" not in text and "refused" not in text
    assert "\nb\n" in text and text.endswith("c\n")


def test_a_head_that_fails_is_counted_and_named(page: Path) -> None:
    write_page(page, [_outcome(HEAD, "wrong numbers"), _outcome("bert-dynamo-span")], {})
    text = page.read_text()
    assert "| span | bert | 1 |  |  | 0 of 1 |  |  |" in text
    assert f"`{HEAD}`: wrong numbers" in text


def test_every_output_of_a_default_compile_counts(page: Path) -> None:
    of_outputs = {"start": {"kl_mean": 2e-5}, "rows": {"cosine": 0.9998}}
    report = {"outputs": of_outputs, "masked": {"start": {"kl_mean": 3e-5}}}
    write_page(page, [_outcome(HEAD, default=report)], {})
    assert "| 3.0e-05 nats, cosine 0.9998 |" in page.read_text()


def test_the_page_in_the_docs_has_all_places() -> None:
    text = (Path(__file__).parents[2] / "docs" / "import.md").read_text()
    assert text.index(BEGIN) < text.index(BEGIN_HEADS) < text.index(BEGIN_PRUNED)


def test_pruned_models_have_a_table_of_their_own(page: Path) -> None:
    page.write_text(f"{page.read_text()}{BEGIN_PRUNED}\n\nold pruned\n{END}\nd\n")
    cells = ("bert-pruned-optimum", "bert-pruned-optimum-fp16", "bert-dynamo-pruned-2-4")
    write_page(page, [_outcome(cell, skipping={"blocks": 2, "4of8": 1}) for cell in cells], {})
    text = page.read_text()
    assert "to the same bits: 3 by `4of8`, 6 by `blocks`." in text
    assert "old base" in text and "old heads" in text and "old pruned" not in text
    assert "3 of 3 files pass" in text
    assert all(f"| {name} | 1 | all |" in text for name in ("optimum", "fp16", "2-4"))
