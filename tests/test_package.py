"""The package as a whole: cheap to import, complete when installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import slmtvm

ROOT = Path(__file__).resolve().parents[1]
COMPILER_ONLY = {"tvm", "onnx", "onnxruntime", "ziglang"}


def _imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "unneeded"),
    [
        ("import slmtvm", {*COMPILER_ONLY, "numpy", "tokenizers", "tqdm"}),
        ("import slmtvm.cli", {*COMPILER_ONLY, "numpy", "tokenizers", "tqdm"}),
        ("import slmtvm; slmtvm.load", COMPILER_ONLY),
        ("import slmtvm; slmtvm.SlmError", {*COMPILER_ONLY, "numpy"}),
        ("import slmtvm.cli.run, slmtvm.runtime.text", COMPILER_ONLY),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, unneeded: set[str]) -> None:
    assert not _imported_by(statement) & unneeded


@pytest.mark.parametrize("name", slmtvm.__all__)
def test_every_public_name_is_a_class_or_a_function(name: str) -> None:
    assert callable(getattr(slmtvm, name))


@pytest.mark.slow
def test_a_public_function_wins_over_the_submodule_of_its_name() -> None:
    code = "from slmtvm.without_torch import import_no_torch; import_no_torch()\n"
    code += "import slmtvm.verify.compare, slmtvm.inspect, slmtvm; assert callable(slmtvm.verify)"
    code += "; assert callable(slmtvm.inspect)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        slmtvm.nothing  # noqa: B018


@pytest.mark.slow
def test_a_wheel_holds_every_file_that_the_package_reads(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files beside its sources
    for folder in ("slmtvm", "schedules", "targets"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("slmtvm-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / "slmtvm", ROOT / "slmtvm" / "schedules", ROOT / "slmtvm" / "targets"]
    needed = {
        str(path.relative_to(ROOT))
        for folder in folders
        for suffix in ("py", "toml", "c", "h", "sh", "json")
        for path in folder.rglob(f"*.{suffix}")
    }
    assert {"slmtvm/schedules/kernel.py", "slmtvm/targets/cortex-a78.toml"} <= needed
    needed.add("slmtvm/packaging/LICENSE.txt")
    assert {"slmtvm/codegen/runtime/slm.h", "slmtvm/codegen/programs/slm-install.sh"} <= needed
    assert needed <= packed
