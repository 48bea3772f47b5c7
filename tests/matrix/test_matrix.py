"""Models times targets: each in a process of its own, here or on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slmtvm
from slmtvm.bundle import Bundle
from slmtvm.errors import SlmError
from slmtvm.matrix.result import CellResult, MatrixReport
from slmtvm.matrix.spec import read_matrix
from slmtvm.target import Target
from tests.cli.command import slmtvm as command
from tests.models import model_path
from tests.ray_cluster import ray_cluster

HOST = Target.load("host").name
MODEL = model_path("demo")


def matrix(folder: Path, *lines: str, targets: str = f'["{HOST}", "riscv64-rvv"]') -> Path:
    """A file of the demo model and a damaged one."""
    (folder / "bad.onnx").write_bytes(b"no model")
    path = folder / "matrix.toml"
    path.write_text(
        f"targets = {targets}\noutput = 'out'\ncheck = false\ncontext = 64\n"
        + "\n".join(lines or (f'[[model]]\npath = "{MODEL}"\nname = "demo"',))
        + '\n[[model]]\npath = "bad.onnx"\n'
    )
    return path


def test_cells_are_models_times_targets(tmp_path: Path) -> None:
    cells = read_matrix(matrix(tmp_path))
    assert [c.name for c in cells] == [
        f"demo.{HOST}", "demo.riscv64-rvv", f"bad.{HOST}", "bad.riscv64-rvv"
    ]  # fmt: skip
    assert cells[0].output == tmp_path / "out" / f"demo.{HOST}.slm"
    assert cells[0].options == {"check": False, "context": 64}
    assert read_matrix(tmp_path / "matrix.toml", tmp_path / "x")[1].output.parent.name == "x"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("contxt = 3", "'contxt' is no field"),
        ("[[model]]\nname = 'x'", "model 1: has no path"),
        ("[[model]]\npath = 'there.onnx'", "model 1: no such file"),
        ("[[model]]\npath = 'bad.onnx'", "is there twice"),
        ("[[model]]\npath = 'bad.onnx'\nname = '../x'", "must be letters"),
        ("[[model]]\npath = 'bad.onnx'\nname = 'x'\nkv = 3", "kv must be str, not 3"),
        ("[[model]", "is no TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SlmError, match=message) as caught:
        read_matrix(matrix(tmp_path, line))
    assert "matrix.toml" in str(caught.value)


def test_an_unknown_target_is_found_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(SlmError, match="no-such-board"):
        slmtvm.compile_matrix(matrix(tmp_path, targets='["no-such-board"]'))


def test_a_summary_counts_what_failed() -> None:
    report = MatrixReport(
        (CellResult("a", "t", "a.t.slm", 1.0, 2000, 3000), CellResult("b", "t", "", 1, error="no")),
        2.0,
    )
    assert report.failed == 1 and "failed: no" in str(report)
    assert str(report).endswith("1 of 2 compiled in 2.0 s")


@pytest.mark.slow
def test_what_fails_does_not_keep_the_rest(tmp_path: Path) -> None:
    told = tmp_path / "summary.json"
    file = matrix(tmp_path, targets='["riscv64-rvv"]')
    result = command("compile-matrix", file, "--jobs", "2", "--json", told)
    assert result.returncode == 1
    assert "1 of 2 compiled" in result.stdout and "failed: " in result.stdout
    summary = json.loads(told.read_text())
    assert [cell["error"] is None for cell in summary["cells"]] == [True, False]
    assert "bad.onnx" in summary["cells"][1]["error"]
    assert Bundle.open(tmp_path / "out" / "demo.riscv64-rvv.slm").targets == ("riscv64-rvv",)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["demo.riscv64-rvv.slm"]


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SlmError, match=r"pip install 'slmtvm\[cluster\]'"):
        slmtvm.compile_matrix(matrix(tmp_path), cluster="ray://127.0.0.1:1")


@pytest.fixture
def cluster() -> Iterator[str]:
    with ray_cluster() as address:
        yield address


@pytest.mark.exhaustive
def test_a_matrix_is_compiled_on_a_cluster_of_two_nodes(cluster: str, tmp_path: Path) -> None:
    assert cluster
    report = slmtvm.compile_matrix(matrix(tmp_path), cluster=cluster)
    assert [cell.error is None for cell in report.cells] == [True, True, False, False]
    here = tmp_path / "here"
    slmtvm.compile_matrix(matrix(tmp_path, targets=f'["{HOST}"]'), output=here)
    name = f"demo.{HOST}.slm"
    for item in (tmp_path / "out" / name).rglob("*"):
        if item.is_file():
            there = here / name / item.relative_to(tmp_path / "out" / name)
            assert item.read_bytes() == there.read_bytes(), item
