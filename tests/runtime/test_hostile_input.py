"""Damaged bundles and absurd calls end in an error, never in a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target
from tests.runtime.conftest import ToyBundle

ROOT = Path(__file__).parents[2]
MUTANTS = 4000
CALLS = 50000


@pytest.mark.slow
def test_thousands_of_mutated_bundles_are_refused_or_work(decoder: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.runtime.open_mutants", str(decoder), str(tmp_path), "1",
         str(MUTANTS)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    library = next(name for name in outcomes if ".so " in name).split()[0]
    assert f"{library} works" not in outcomes
    assert "weights.bin works" not in outcomes
    assert not any("without saying where" in outcome for outcome in outcomes), outcomes
    for wanted in (f"{library} refused", "weights.bin refused", "manifest.json refused",
                   "refused by the library", "opened unchecked"):  # fmt: skip
        assert outcomes[wanted] > MUTANTS // 50


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mask", ["none", pytest.param("keys", marks=pytest.mark.slow), "skip"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_random_calls_of_the_c_interface_answer_as_documented(
    kind: str, mask: str, threads: int, tmp_path: Path, toy_bundle: ToyBundle
) -> None:
    bundle = toy_bundle(kind, mask)
    target = Target.load("host")
    library = bundle / "lib" / f"{target.name}.so"
    program = tmp_path / "hostile_calls"
    zig_cc(
        target.link,
        ["-O1", f"-I{ROOT}/slmtvm/codegen/runtime", "-o", str(program),
         str(ROOT / "tests/runtime/hostile_calls.c"), str(library),
         f"-Wl,-rpath,{library.parent}", "-pthread", "-lm"],
    )  # fmt: skip
    result = subprocess.run(
        [program, bundle, "1", str(CALLS), str(threads)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
