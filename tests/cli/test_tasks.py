"""slmtvm run on models that write no text: labels, answers, fills, embeddings, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import slmtvm
from slmtvm.cli.main import main
from slmtvm.verify import Reference
from tests.importer.heads import DIM, ENCODERS, VOCAB, Head, save_head

LABELS = {"0": "bad", "1": "fine", "2": "good"}


def _save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(VOCAB - 3)}
    words |= {"[CLS]": VOCAB - 3, "[SEP]": VOCAB - 2, "[MASK]": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCAB - 3), ("[SEP]", VOCAB - 2)],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))


def _ids(first: list[int], second: list[int] | None = None) -> tuple[list[int], list[int]]:
    """The tokens and segments of words by number."""
    ids = [VOCAB - 3, *first, VOCAB - 2]
    pair = [] if second is None else [*second, VOCAB - 2]
    return [*ids, *pair], [*(0 for _ in ids), *(1 for _ in pair)]


def _compile(head: Head, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Path:
    model = save_head(head, folder, types="table")
    _save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"id2label": LABELS}))
    assert main(["compile", str(model), "-o", str(folder / "x.slm"), *more]) == 0
    return folder / "x.slm"


@pytest.mark.slow
def test_labels_come_for_texts_pairs_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _compile(ENCODERS["classifier"], tmp_path, capsys)
    assert (
        "output                   logits: 3 numbers for the whole text" in capsys.readouterr().out
    )
    reference = Reference(tmp_path / "model.onnx")

    def want(first: list[int], second: list[int] | None = None) -> list[str]:
        ids, segments = _ids(first, second)
        logits = reference.run(ids, ["logits"], segments=segments)[0][0]
        return [LABELS[str(i)] for i in np.argsort(-logits)]

    assert main(["run", str(bundle), "--prompt", "w7 w8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == want([7, 8])
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=1e-3)

    pairs = ["--prompt", "w7", "--pair", "w9 w4", "--pair", "w30", "--json", "--top", "2"]
    assert main(["run", str(bundle), *pairs]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["pair"] for f in found] == ["w9 w4", "w30"]
    for each, second in zip(found, ([9, 4], [30]), strict=True):
        assert [label["label"] for label in each["labels"]] == want([7], second)[:2]

    texts = tmp_path / "texts.txt"
    texts.write_text("w7\tw9 w4\n\nw7 w8\n")
    assert main(["run", str(bundle), "--file", str(texts), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "w7\tw9 w4" and lines[1].split()[1] == want([7], [9, 4])[0]
    assert lines[2] == "w7 w8" and lines[3].split()[1] == want([7, 8])[0]


@pytest.mark.slow
def test_outputs_are_chosen_and_those_left_out_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = ENCODERS["tokens_and_embedding"]
    bundle = _compile(head, tmp_path, capsys, "--outputs", "token_embeddings")
    out = capsys.readouterr().out
    assert f"token_embeddings: {DIM} numbers for each token" in out
    assert "left out                 sentence_embedding: it is not asked for" in out
    assert main(["run", str(bundle), "--prompt", "w7 w8", "--pool", "max", "--normalize"]) == 0
    got = np.array([float(x) for x in capsys.readouterr().out.split()])
    ids, _ = _ids([7, 8])
    rows = Reference(tmp_path / "model.onnx").run(ids, ["token_embeddings"])[0][0]
    want = rows.max(axis=0) / np.linalg.norm(rows.max(axis=0))
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert main(["run", str(bundle), "--prompt", "w7 w8", "--json"]) == 0
    captured = capsys.readouterr()
    assert "the mean of the tokens' rows: choose with --pool" in captured.err
    np.testing.assert_allclose(json.loads(captured.out)["embedding"], rows.mean(0), atol=2e-4)
    assert slmtvm.inspect(tmp_path / "model.onnx").outputs[1].name == "sentence_embedding"


@pytest.mark.slow
def test_an_answer_needs_a_text_to_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _compile(ENCODERS["span"], tmp_path, capsys)
    capsys.readouterr()
    assert main(["run", str(bundle), "--prompt", "w7"]) == 1
    assert "give the text with --pair" in capsys.readouterr().err
    assert main(["run", str(bundle), "--prompt", "w7", "--pair", "w5 w6 w40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["answer"]
    assert found["text"] == "w5 w6 w40"[found["start"] : found["end"]] != ""
    assert main(["run", str(bundle), "--prompt", "w7", "--task", "generate"]) == 1
    assert "this model writes no text; what it is for is --task answer" in capsys.readouterr().err
