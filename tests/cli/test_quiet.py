"""What ``compile`` tells, and that --quiet leaves it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmtvm import compiler
from slmtvm.bundle import Bundle
from slmtvm.bundle.manifest import FileEntry, Manifest
from slmtvm.cli.main import main

MODEL = {
    "family": "llama",
    "kind": "decoder",
    "mask": "none",
    "context": 8,
    "vocab_size": 5,
    "outputs": [{"name": "logits", "features": 5, "pooled": False}],
    "left_out": {},
}
MANIFEST = Manifest(FileEntry("weights.bin", 9, "0"), {}, MODEL)


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_bundle_without_a_tokenizer_is_warned_of_unless_all_is_quiet(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: bool,
    quiet: bool,
) -> None:
    def compile_model(*_: object, output: Path, **__: Any) -> Bundle:
        entry = FileEntry("tokenizer.json", 2, "0") if tokenizer else None
        return Bundle(output, replace(MANIFEST, tokenizer=entry))

    monkeypatch.setattr(compiler, "compile_model", compile_model)
    code = main(["compile", "x.onnx", "-o", "x.slm", *(["--quiet"] if quiet else [])])
    shown = capsys.readouterr()
    assert code == 0
    assert shown.out.startswith("x.slm: llama decoder") == (not quiet)
    assert ("warning: x.slm has no tokenizer" in shown.err) == (not quiet and not tokenizer)
