"""Folders in which bundles are built: made, removed, and swept where their maker is dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slmtvm.bundle import build_folder as building
from slmtvm.bundle.build_folder import aside, build_folder

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["x.slm", "[x]*?.slm", "n" * 255, "ü" * 127])
def test_the_folder_is_beside_its_place_and_gone_afterwards(tmp_path: Path, name: str) -> None:
    with build_folder(tmp_path / name) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".")
        (folder / "lib").mkdir()
    assert names(tmp_path) == []


def left_by_a_killed_process(path: Path) -> Path:
    """The folder of a process that ended without any clean-up."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from slmtvm.bundle.build_folder import build_folder\n"
        "with build_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights.bin').write_text('much')\n"
        "    print(folder, flush=True)\n    os._exit(9)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 9, result.stderr
    return Path(result.stdout.strip())


def test_what_a_killed_process_left_is_swept_by_the_next_for_the_same_place(tmp_path: Path) -> None:
    left = left_by_a_killed_process(tmp_path / "x.slm")
    other = left_by_a_killed_process(tmp_path / "y.slm")
    with build_folder(tmp_path / "x.slm"):
        assert not left.exists()
        assert other.exists()


def test_a_folder_whose_maker_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.slm"
    with build_folder(path) as first:
        with build_folder(path) as second:
            assert first.is_dir() and first != second
        assert first.is_dir()


def test_what_only_looks_like_one_is_left_alone(tmp_path: Path) -> None:
    for name in (".x.slm.backup", ".x.slm.2026-11-29", ".x.slmabcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / ".x.slm.abcdefgh").write_text("a file")
    (tmp_path / ".x.slm.ijklmnop").symlink_to(tmp_path)
    before = names(tmp_path)
    with build_folder(tmp_path / "x.slm"):
        pass
    assert names(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_an_older_bundle_set_aside_goes_only_where_there_is_a_new_one(
    tmp_path: Path, there: bool
) -> None:
    path = tmp_path / "x.slm"
    older = aside(tmp_path / ".x.slm.abcdefgh")
    older.mkdir()
    if there:
        path.mkdir()
    with build_folder(path):
        assert older.exists() == (not there)


def test_where_locks_are_unknown_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = left_by_a_killed_process(tmp_path / "x.slm")
    monkeypatch.setattr(building, "_lock", lambda *_, **__: False)
    with build_folder(tmp_path / "x.slm") as folder:
        assert folder.is_dir()
    assert names(tmp_path) == [left.name]
