"""``slmtvm bench``: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmtvm.cli import main


def test_the_verb_prints_and_writes_what_it_measured(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, page = tmp_path / "bench.json", tmp_path / "bench.html"
    options = ["--threads", "1", "--json", str(numbers), "--html", str(page)]
    assert main(["bench", str(decoder), *options]) == 0
    written = json.loads(numbers.read_text())
    assert written["bundle"] == decoder.name
    assert {limit["threads"] for limit in written["limits"]} == {1}
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "decode at 0" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_named(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "none" / "bench.json"
    assert main(["bench", str(decoder), "--threads", "1", "--json", str(target)]) == 1
    assert f"{target}: cannot be written" in capsys.readouterr().err
