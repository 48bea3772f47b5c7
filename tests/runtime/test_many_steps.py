"""Each part of a step is computed once, however late threads come to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
SOURCES = ("pool.c", "cores.c", "pace.c", "error.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "many_steps"
    sources = [Path(__file__).with_name("many_steps.c"), *(RUNTIME / name for name in SOURCES)]
    options = ["-O2", "-std=gnu11", f"-I{RUNTIME}", "-pthread"]
    zig_cc(Target.load("host").link, [*options, *map(str, sources), "-o", str(path)])
    return path


@pytest.mark.parametrize(
    ("threads", "mixed", "steps"),
    [(2, 0, 200_000), (2, 1, 50_000), (3, 0, 5_000), (4, 1, 2_000)],
)
def test_each_part_of_a_short_step_is_computed_once(
    threads: int, mixed: int, steps: int, program: Path
) -> None:
    command = [str(program), str(threads), str(mixed), str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "done\n")
