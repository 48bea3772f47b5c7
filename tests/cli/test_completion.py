"""The scripts complete verbs, options, targets and other values, as the shell itself runs them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from slmtvm.cli.completion import completion_script
from slmtvm.cli.main import command_parser
from slmtvm.target import known_targets

CASES = [
    (("slmtvm", "comp"), {"compile", "compile-matrix", "completion"}),
    (("slmtvm", "compile", "--kv", ""), {"f16", "f32", "int8", "int4"}),
    (
        ("slmtvm", "compile", "x.onnx", "--target", ""),
        {"host", *known_targets(), *known_targets(cuda=True)},
    ),
    (("slmtvm", "run", "x.slm", "--top"), {"--top", "--top-k", "--top-p"}),
    (("slmtvm", "completion", ""), {"bash", "zsh", "fish"}),
    (("slmtvm", "--ver"), {"--version"}),
    (("slmtvm", "compile", "--tokenizer", "f"), set()),  # a file: the shell's own completion
]


def script_of(shell: str) -> str:
    return completion_script(shell, command_parser())


def run(shell: str, *arguments: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here; on Debian and Ubuntu: apt install {shell}")
    return subprocess.run(
        [shell, *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash_completes(words: tuple[str, ...], expected: set[str]) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _slmtvm"
    script = f"{script_of('bash')}\n{ask}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    assert set(run("bash", "--norc", "-c", script).split()) == expected


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_fish_completes(words: tuple[str, ...], expected: set[str]) -> None:
    script = f"{script_of('fish')}\ncomplete -C {' '.join(words)!r}"
    found = {line.split("\t")[0] for line in run("fish", "--no-config", "-c", script).splitlines()}
    assert expected <= found
    if expected:
        assert not {"compile", "--version"} & (found - expected)


def test_zsh_takes_the_script() -> None:
    script = f"{script_of('zsh')}\nwhence -w _slmtvm; print -r -- $_comps[slmtvm]"
    assert "_slmtvm: function" in run("zsh", "-f", "-c", script)
    assert "_bash_complete" in run("zsh", "-f", "-c", script)
