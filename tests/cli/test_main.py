"""The command's own manners: help, exit codes, one line for an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from slmtvm.bundle.manifest import FORMAT
from slmtvm.cli import targets
from slmtvm.cli.main import main
from slmtvm.errors import SlmError
from slmtvm.target import known_targets
from tests.cli.command import ROOT, slmtvm

VERBS = ("compile", "run", "inspect", "verify", "targets", "completion")


def test_help_names_every_verb() -> None:
    result = slmtvm("--help")
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = slmtvm(verb, "--help")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.slow
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
def test_no_time_is_spent_on_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, "-m", "slmtvm.cli", "inspect", str(tmp_path / "missing.onnx")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stderr == f"slmtvm: error: {tmp_path}/missing.onnx: no such file\n"


@pytest.mark.slow
def test_debug_shows_the_traceback_before_or_after_the_verb() -> None:
    for arguments in (
        ("--debug", "inspect", "missing.onnx"),
        ("inspect", "missing.onnx", "--debug"),
    ):
        result = slmtvm(*arguments)
        assert result.returncode == 1
        assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("complie", "x.onnx"), "did you mean compile?; see slmtvm --help"),
        (("compile",), "the following arguments are required: model, -o/--output"),
        (("compile", "x.onnx", "-o", "y", "--kv", "f61"), "did you mean f16?"),
        (("run", "x.slm", "--prompt", "x", "--max-tokens", "0"), "not a whole number of at least"),
        (("run", "x.slm", "--prompt", "x", "--threads", "-1"), "0 stands for one for each core"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_told_from_an_error(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 64
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("slmtvm") and words in errors
    assert errors.count("\n") == 1


def test_without_a_verb_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    shown = capsys.readouterr().err
    assert all(verb in shown for verb in VERBS)


def test_version_names_what_it_works_with_and_imports_none_of_it() -> None:
    code = (
        "import sys\nfrom slmtvm.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "assert not {'tvm', 'onnx', 'onnxruntime', 'ziglang', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    first, second, rest = result.stdout.split("\n")
    assert first.startswith("slmtvm ") and rest == ""
    for name in ("apache-tvm", "onnxruntime"):
        assert metadata.version(name) in second
    assert second.endswith(f"bundle format {FORMAT}")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (SlmError("two\n  lines", where="x"), 1, "slmtvm: error: x: two lines"),
        (OSError(36, "File name too long", "long.onnx"), 1,
         "slmtvm: error: long.onnx: File name too long"),
        (MemoryError(), 1, "slmtvm: error: there is not enough memory"),
        (ImportError("libx.so: Too many open files"), 1,
         "slmtvm: error: this process may not open enough files (ulimit -n)"),
        (AssertionError("odd"), 70,
         "slmtvm: internal error: AssertionError: odd; this is a fault of slmtvm: please report it "
         "with what --debug shows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("debug", [False, True])
def test_whatever_goes_wrong_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: Exception,
    code: int,
    line: str,
    debug: bool,
) -> None:
    def fail(_options: object) -> int:
        raise raised

    monkeypatch.setattr(targets, "run", fail)
    assert main(["targets", *(["--debug"] if debug else [])]) == code
    *before, last = capsys.readouterr().err.splitlines()
    assert last == line
    assert bool(before) == debug and ("Traceback (most recent call last):" in before) == debug


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_and_gives_the_exit_code_that_shells_do(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    unwound = []

    def wait(_options: object) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)  # a second one does not stop the unwinding
            unwound.append(number)
        return 0

    monkeypatch.setattr(targets, "run", wait)
    # Whoever runs the tests may ignore it (nohup), and it would stay so.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert main(["targets"]) == code
        assert unwound == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_was_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(_options: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(targets, "run", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["targets"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_standard_output_is_an_error_of_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "slmtvm.cli", "targets"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "slmtvm: error: standard output: No space left on device\n"


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_are_no_error(closed: tuple[int, ...]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "slmtvm.cli", "targets"],
        cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: [os.close(number) for number in closed],
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stderr == ""


def test_targets_lists_every_target_and_this_machine() -> None:
    result = slmtvm("targets")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [*known_targets(), *known_targets(cuda=True), "host"]
