"""What scripts/bench_isa.py says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from isa.requirements import SYSROOTS, missing_models, missing_tools

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_isa.py"


def test_each_missing_tool_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(SYSROOTS, "riscv64", tmp_path / "none")
    lines = missing_tools(["riscv64"])
    assert [line.split(":")[0] for line in lines] == [
        "cc", "cmake", "llvm-mca", "qemu-riscv64", str(tmp_path / "none"),
    ]  # fmt: skip
    assert lines[-1].endswith("package libc6-riscv64-cross")


def test_a_tool_that_is_here_is_not_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cc", "cmake", "llvm-mca-19", "qemu-aarch64"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(SYSROOTS, "aarch64", tmp_path)
    assert missing_tools(["aarch64"]) == []


def test_missing_model_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "demo" / "int4").mkdir(parents=True)
    (tmp_path / "demo" / "int4" / "model.onnx").write_bytes(b"")
    found = missing_models(tmp_path, ["demo"], ["int4", "int8"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "demo/int4.gguf", "demo/int8/model.onnx", "demo/int8.gguf",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_script_ends_with_a_sentence_and_not_with_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Debian has" in result.stderr or "make_bench_models.py" in result.stderr
    assert "Traceback" not in result.stderr
