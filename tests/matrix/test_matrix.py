"""Models times targets: each in a process of its own, here or on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import slmtvm
from slmtvm.bundle import Bundle
from slmtvm.errors import SlmError
from slmtvm.matrix.result import CellResult, MatrixReport
from slmtvm.matrix.spec import Cell, read_matrix
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


class StandIn:
    """What of Ray's interface is used, in this process; a task whose model is bad is lost."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

    def __init__(self) -> None:
        self.connected: list[str] = []

    def init(self, address: str, **_: Any) -> None:
        self.connected.append(address)

    def shutdown(self) -> None:
        self.connected.append("shut down")

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Callable[[Callable[..., Any]], Any]:
        stand_in = self

        class Remote:
            def __init__(self, function: Callable[..., Any]) -> None:
                self._function = function

            def remote(self, cell: Cell, *arguments: Any) -> Any:
                lost = cell.model == "bad"
                error = stand_in.exceptions.RayError("the node died\nat once")
                done: Any = error if lost else self._function(cell, *arguments)
                return lambda: done

        return Remote

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[:num_returns], running[num_returns:]

    def get(self, done: Any) -> Any:
        if isinstance(done(), Exception):
            raise done()
        return done()


def test_files_travel_to_a_cluster_and_bundles_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(cell: Cell) -> CellResult:
        """The bundle holds what the node was sent."""
        (cell.output / "lib").mkdir(parents=True)
        names = ",".join(sorted(p.name for p in cell.path.parent.iterdir()))
        records = cell.files["records"].read_bytes()
        (cell.output / "lib" / "x.so").write_bytes(cell.path.read_bytes() + records)
        (cell.output / "manifest.json").write_text(names)
        return CellResult(cell.model, cell.target, str(cell.output), 1.0)

    ray = StandIn()
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    monkeypatch.setattr("slmtvm.matrix.cluster.run_cell", compiled)
    models = tmp_path / "models"
    models.mkdir()
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json", "other.onnx"):
        (models / name).write_text(name)
    (tmp_path / "r.jsonl").write_text("+records")
    good = '[[model]]\npath = "models/model.onnx"\nname = "good"'
    file = matrix(tmp_path, 'records = "r.jsonl"', good, targets=f'["{HOST}"]')
    report = slmtvm.compile_matrix(file, cluster="ray://there:1")
    assert ray.connected == ["ray://there:1", "shut down"]
    assert [cell.error for cell in report.cells] == [None, "the node died"]
    made = tmp_path / "out" / f"good.{HOST}.slm"
    assert report.cells[0].bundle == str(made)
    assert (made / "lib" / "x.so").read_text() == "model.onnx+records"
    assert (made / "manifest.json").read_text() == "model.onnx,model.onnx.data,tokenizer.json"
    assert [p.name for p in made.parent.iterdir()] == [made.name]


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
