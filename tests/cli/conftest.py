"""The demo model compiled for this machine by the command itself, once for a test process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.command import slmtvm
from tests.models import model_path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "demo.slm"
    result = slmtvm("compile", model_path("demo"), "-o", path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}: llama decoder, context 1024 tokens"
    assert [line.split()[0] for line in lines[1:]] == [
        "weights", "KV", _host_library(path), "checked:"
    ]  # fmt: skip
    assert re.fullmatch(r"  checked: KL \de-\d over 64 tokens", lines[-1])
    return path


def _host_library(bundle: Path) -> str:
    (library,) = (bundle / "lib").glob("*.so")
    return library.stem
