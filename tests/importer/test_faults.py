"""Exceptions that nothing in the importer foresaw."""

from __future__ import annotations

import errno

import pytest

from slmtvm.cli.main import main
from slmtvm.errors import InternalError, InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx, import_with_mask
from slmtvm.importer.read.load import count_operators, load
from slmtvm.inspect import inspect
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build

# Functions of the importer, and what the error says of where: the file, or a node of this operator.
PLACES = {
    "importer.recognise.attention.attention.heads_of": "MatMul node 'MatMul_",
    "importer.freeze.freeze.infer": "Gather node 'Gather_",
    "importer.importing.choose_outputs": "",
    "importer.importing.load": "",
    "importer.importing.mask_kind": "",
}


def failing(monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(f"slmtvm.{place}", fail)


@pytest.fixture
def path(tmp_path):
    return save(build(Tiny()), tmp_path)


@pytest.mark.parametrize("error", [KeyError("w"), AssertionError(), RecursionError("too\ndeep")])
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_names_file_and_node_and_asks_for_a_report(place, error, path, monkeypatch):
    failing(monkeypatch, place, error)
    if place.endswith("mask_kind"):
        monkeypatch.setattr("slmtvm.importer.importing.check_mask_input", lambda *_: None)
    with pytest.raises(InternalError) as caught:
        import_with_mask(path)
    message = str(caught.value)
    node = PLACES[place]
    assert message.startswith(f"{path}: {node}" if node else f"{path}: slmtvm itself failed here")
    assert type(error).__name__ in message
    assert f"`slmtvm inspect {path} --report FILE`" in message
    assert "\n" not in message
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, UnsupportedOpError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), SystemExit(3)])
@pytest.mark.parametrize("place", PLACES)
def test_an_interruption_or_a_lack_of_memory_stays_what_it_is(place, error, path, monkeypatch):
    failing(monkeypatch, place, error)
    monkeypatch.setattr("slmtvm.importer.importing.check_mask_input", lambda *_: None)
    with pytest.raises(type(error)):
        import_with_mask(path)


def test_a_file_that_cannot_be_read_to_its_end_is_no_fault_of_ours(path, monkeypatch):
    failing(monkeypatch, "importer.importing.load", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(InvalidModelError, match=r"cannot be read: OSError: .*Input/output error"):
        import_onnx(path)


def test_counting_operators_names_the_file(path, monkeypatch):
    failing(monkeypatch, "importer.read.load._texts", ValueError("odd"))
    with pytest.raises(InternalError, match=str(path)):
        count_operators(path)


def test_the_report_of_a_fault_can_be_written_and_shows_it_again(
    path, tmp_path, monkeypatch, capsys
):
    failing(
        monkeypatch, "importer.recognise.attention.attention.heads_of", ValueError("not foreseen")
    )
    report = tmp_path / "report.onnx"
    assert main(["inspect", str(path), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "cannot be compiled" in printed
    assert "not foreseen" in printed
    assert f"{report}: the graph without" in printed
    assert len(load(report).nodes) == len(load(path).nodes)
    assert "not foreseen" in inspect(report).unsupported


def test_debug_shows_the_original_exception(path, tmp_path, monkeypatch, capsys):
    failing(
        monkeypatch, "importer.recognise.attention.attention.heads_of", ValueError("not foreseen")
    )
    command = ["compile", str(path), "-o", str(tmp_path / "x.slm")]
    assert main(command) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command, "--debug"]) == 1
    assert "ValueError: not foreseen" in capsys.readouterr().err
    assert not (tmp_path / "x.slm").exists()
