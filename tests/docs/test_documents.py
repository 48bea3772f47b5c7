"""What the documents tell a reader to type works, in the order in which they tell it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slmtvm.codegen.zig import caches
from tests.shared_folder import shared_folder

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def _blocks(document: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(document.read_text())


@pytest.fixture
def reader(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root, with a ``slmtvm`` command."""
    for name in ("models", "examples", "slmtvm"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = tmp_path / "bin" / "slmtvm"
    command.parent.mkdir()
    objects = shared_folder(tmp_path_factory) / "objects"
    objects.mkdir(exist_ok=True)
    run = f"PYTHONPATH={ROOT} exec {sys.executable} -m tests.docs.command {objects}"
    command.write_text(f'#!/bin/sh\n{run} "$@"\n')
    command.chmod(0o755)
    if shutil.which("cc") is None:
        compiler = command.with_name("cc")
        compiler.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang cc "$@"\n')
        compiler.chmod(0o755)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if _blocks(d)], ids=lambda d: d.name)
def test_the_commands_of_a_document_succeed(document: Path, reader: Path) -> None:
    environment = {
        **os.environ,
        **caches(),
        "PATH": f"{reader / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    interpreters = {"sh": ["sh", "-eu", "-c"], "python": [sys.executable, "-c"]}
    for language, code in _blocks(document):
        for program in re.findall(r"qemu-\w+-static", code):
            if shutil.which(program) is None:
                pytest.skip(f"no {program} here: apt install qemu-user-static")
        result = subprocess.run(
            [*interpreters[language], code],
            cwd=reader, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, f"{code}\n{result.stderr}"
        assert result.stdout or "-o generate" in code, f"{code}\nprinted nothing"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    for link in _LINK.findall(document.read_text()):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("path", re.findall(r"`((?:slmtvm|schedules)/[\w/.]+)`", "".join(
    document.read_text() for document in DOCUMENTS
)))  # fmt: skip
def test_a_path_that_a_document_names_exists(path: str) -> None:
    assert (ROOT / path).exists()
