"""The command's own manners: help, exit codes, one line for an error."""

from __future__ import annotations

import pytest

from slmtvm.target import known_targets
from tests.cli.command import ROOT, slmtvm

VERBS = ("compile", "run", "inspect", "verify", "targets")


def test_help_names_every_verb() -> None:
    result = slmtvm("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = slmtvm(verb, "--help")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("compile", "missing.onnx", "-o", "out.slm"),
        ("compile", "models/pycode-6m/model_int4.onnx", "-o", "out.slm", "--target", "z80"),
        ("inspect", "missing.onnx"),
        ("inspect", "README.md"),
        ("run", "missing.slm", "--prompt", "x"),
        ("verify", "missing.slm", "models/pycode-6m/model_int4.onnx"),
        ("verify", "missing.slm", "missing.onnx", "--text", "missing.txt"),
    ],
)
def test_an_error_is_one_line_that_names_the_cause(arguments: tuple[str, ...]) -> None:
    result = slmtvm(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("slmtvm: error: ")
    assert result.stderr.count("\n") == 1
    assert any(argument in result.stderr for argument in arguments)
    assert not (ROOT / "out.slm").exists()


@pytest.mark.slow
def test_debug_shows_the_traceback_before_or_after_the_verb() -> None:
    for arguments in (
        ("--debug", "inspect", "missing.onnx"),
        ("inspect", "missing.onnx", "--debug"),
    ):
        result = slmtvm(*arguments)
        assert result.returncode == 1
        assert "Traceback" in result.stderr


def test_wrong_usage_is_told_from_an_error() -> None:
    for arguments in ((), ("compile",), ("run", "x.slm", "--prompt", "x", "--max-tokens", "0")):
        result = slmtvm(*arguments)
        assert result.returncode == 2
        assert "usage:" in result.stderr


def test_targets_lists_every_target_and_this_machine() -> None:
    result = slmtvm("targets")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [*known_targets(), "host"]
