"""The linker where its cache or the disk cannot be written, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from slmtvm.codegen import zig
from slmtvm.codegen.zig import cache_folder, library_folder, zig_cc
from slmtvm.errors import SlmError
from tests.small_disk import small_disk

TRIPLE = "x86_64-linux-gnu.2.28"
ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str = "int seven(void) { return 7; }\n") -> list[str]:
    (folder / "seven.c").write_text(text)
    return ["-shared", "-o", "seven.so", "seven.c"]


@pytest.mark.slow
def test_what_is_linked_lies_alone_in_its_folder_and_nothing_new_in_the_cache(
    tmp_path: Path,
) -> None:
    zig_cc(TRIPLE, write(tmp_path), folder=tmp_path)
    before = {p for p in cache_folder().rglob("*") if "seven" in p.name}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seven.c", "seven.so"]
    assert before == set()


def environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, zig is that of another environment, in ``folder``."""
    (folder / "ziglang" / "lib").mkdir(parents=True)
    (folder / f"ziglang-{version('ziglang')}.dist-info").mkdir()
    monkeypatch.setattr(zig, "_ZIG", folder / "ziglang" / "zig")


def test_a_new_environment_has_what_another_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zig's keys hold the path of its library, so that it has to be the same for both."""
    environment(tmp_path / "first", monkeypatch)
    given = library_folder(tmp_path)
    environment(tmp_path / "second", monkeypatch)
    assert library_folder(tmp_path) == given
    assert given.resolve() == tmp_path / "first/ziglang/lib"
    shutil.rmtree(tmp_path / "first")
    assert library_folder(tmp_path) == given
    assert given.resolve() == tmp_path / "second/ziglang/lib"


def test_an_environment_that_has_another_release_by_now_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(tmp_path / "first", monkeypatch)
    library_folder(tmp_path)
    (tmp_path / f"first/ziglang-{version('ziglang')}.dist-info").rename(
        tmp_path / "first/ziglang-9.0.0.dist-info"
    )
    environment(tmp_path / "second", monkeypatch)
    assert library_folder(tmp_path).resolve() == tmp_path / "second/ziglang/lib"


def test_where_the_cache_cannot_be_written_the_path_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(tmp_path / "first", monkeypatch)
    assert library_folder(tmp_path / "nowhere") == tmp_path / "first/ziglang/lib"


def test_of_many_lines_the_first_error_is_told_and_all_are_its_cause(tmp_path: Path) -> None:
    text = "void f(void) {\n  int a = one;\n  int b = two;\n}\n"
    with pytest.raises(SlmError, match=r"zig cc failed for .* 'one' \(and \d+ lines") as caught:
        zig_cc(TRIPLE, write(tmp_path, text), folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert "'two'" in str(caught.value.__cause__)


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SlmError, match=r"file/slmtvm/zig: .* cannot be kept here: Not a directory"):
        zig_cc(TRIPLE, write(tmp_path), folder=tmp_path)


def test_without_a_home_the_variable_to_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(SlmError, match=r"no home folder .*; set XDG_CACHE_HOME"):
        cache_folder()


@pytest.mark.slow
def test_a_full_cache_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "cache", "1m") as cache:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with pytest.raises(SlmError, match=r"XDG_CACHE_HOME to a folder") as caught:
            zig_cc(TRIPLE, write(tmp_path), folder=tmp_path)
    assert str(caught.value).startswith(f"{cache}/slmtvm/zig: ")
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        arguments = write(disk)
        (disk / "rest").write_bytes(bytes(52 << 10))
        with pytest.raises(OSError, match="No space left on device") as caught:
            zig_cc(TRIPLE, arguments, folder=disk)
    assert caught.value.filename == str(disk)


def test_an_interruption_ends_zig_and_all_that_it_started(tmp_path: Path) -> None:
    # A source that the compiler waits for: a pipe that nobody writes to.
    os.mkfifo(tmp_path / "never.c")
    code = (
        "import sys\nfrom pathlib import Path\nfrom slmtvm.codegen.zig import zig_cc\n"
        "from slmtvm.cli.signals import unwinding\n"
        "with unwinding():\n"
        f"    zig_cc({TRIPLE!r}, ['-shared', '-o', 'x.so', 'never.c'], folder=Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not running(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    deadline = time.monotonic() + 10
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == ["never.c"]


def running(folder: Path) -> list[int]:
    """Processes of zig that work in ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("exe").resolve() == zig._ZIG.resolve() and (
                process.joinpath("cwd").resolve() == folder
            ):
                found.append(int(process.name))
        except OSError:
            continue
    return found
