"""Damaged tables and texts that are none leave the sanitizers silent."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from slmtvm.text import compile_tokenizer
from tests.text.kinds import KINDS, make
from tests.text.library import RUNTIME, text_sources

ROUNDS, MANY_ROUNDS = 150, 60_000
_SLOW = pytest.mark.slow


@cache
def program(folder: Path) -> Path:
    result = subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{RUNTIME}",
         *map(str, text_sources()), str(Path(__file__).with_name("hostile_tables.c")),
         "-o", str(folder / "run")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if "cannot find" in result.stderr:
        pytest.skip("gcc has no sanitizers here")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def run(name: str, rounds: int, built: Path, folder: Path) -> None:
    (folder / "tokenizer.bin").write_bytes(compile_tokenizer(make(name).to_str().encode()))
    result = subprocess.run(
        [program(built), folder, "1", str(rounds)], capture_output=True, text=True
    )
    assert result.stderr == "" and result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("no gcc here; on Debian and Ubuntu: apt install gcc libc6-dev")
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama 2", *(pytest.param(n, marks=_SLOW) for n in ("bert", "xlm-roberta", "roberta"))]
)
def test_damaged_tables_are_refused_or_do_no_harm(name: str, built: Path, tmp_path: Path) -> None:
    run(name, ROUNDS, built, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_tables_are_refused_or_do_no_harm(
    name: str, built: Path, tmp_path: Path
) -> None:
    run(name, MANY_ROUNDS, built, tmp_path)
