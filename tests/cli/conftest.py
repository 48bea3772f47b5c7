"""The demo model compiled for this machine by the command itself, once for all tests of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.command import slmtvm
from tests.models import model_path
from tests.shared_folder import made_once


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "by-command.slm", _compile)


def _compile(path: Path) -> None:
    result = slmtvm("compile", model_path("demo"), "-o", path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}: llama decoder, context 1024 tokens"
    assert [line.split()[0] for line in lines[1:]] == [
        "weights", "KV", _host_library(path), "checked:"
    ]  # fmt: skip
    assert re.fullmatch(r"  checked: KL \de-\d over 64 tokens", lines[-1])


def _host_library(bundle: Path) -> str:
    (library,) = (bundle / "lib").glob("*.so")
    return library.stem
