"""A bundle appears whole or not at all, holds what its manifest says, and repeats to the byte."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle import move as moving
from slmtvm.bundle import write as writing
from slmtvm.bundle.write import TextFiles, write_bundle
from slmtvm.errors import BundleError, InvalidModelError, SlmError
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_weights
from tests.small_disk import small_disk

TARGETS = ("cortex-a72", "cortex-a78")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(path: Path, **options: Any) -> Bundle:
    return write_bundle(path, [(Target.load(name), toy_decoder()) for name in TARGETS], **options)


def test_a_bundle_holds_a_library_for_each_target_and_the_weights_once(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"source")
    bundle = write(
        tmp_path / "x.slm", source=tmp_path / "model.onnx", text=TextFiles(b"{}"),
        model={"note": "more"},
    )  # fmt: skip
    files = contents(tmp_path / "x.slm")
    assert set(files) == {
        "manifest.json", "weights.bin", "tokenizer.json",
        *(f"lib/{t}.{kind}" for t in TARGETS for kind in ("so", "o")),
    }  # fmt: skip
    manifest = json.loads(files["manifest.json"])
    assert manifest["format"] == 7
    assert manifest["source"] == {
        "file": "model.onnx", "sha256": hashlib.sha256(b"source").hexdigest(),
    }  # fmt: skip
    assert manifest["model"]["kind"] == "decoder" and manifest["model"]["note"] == "more"
    assert manifest["targets"]["cortex-a78"]["requires"] == list(Target.load("cortex-a78").requires)
    listed = [manifest["weights"], manifest["tokenizer"]]
    listed += [
        entry[kind] for entry in manifest["targets"].values() for kind in ("library", "object")
    ]
    for entry in listed:
        content = files[entry["file"]]
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert bundle.targets == TARGETS
    bundle.verify()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_the_same_input_gives_the_same_bytes_in_any_order_of_targets(tmp_path: Path) -> None:
    write(tmp_path / "a.slm")
    write_bundle(
        tmp_path / "b.slm", [(Target.load(name), toy_decoder()) for name in reversed(TARGETS)]
    )
    assert contents(tmp_path / "a.slm") == contents(tmp_path / "b.slm")


def test_everyone_may_read_a_bundle(tmp_path: Path) -> None:
    path = write(tmp_path / "x.slm").path
    for item in (path, *path.rglob("*")):
        wanted = 0o755 if item.is_dir() or item.suffix == ".so" else 0o644
        assert stat.S_IMODE(item.stat().st_mode) == wanted


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_older_bundle_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(moving, "_exchange", lambda _first, _second: False)
    path = tmp_path / "x.slm"
    write_bundle(path, [(Target.load("cortex-a72"), toy_decoder(toy_weights(seed=9)))])
    write(path)
    write(tmp_path / "y.slm")
    assert contents(path) == contents(tmp_path / "y.slm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.slm", "y.slm"]


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("precious")


def make_link(path: Path) -> None:
    target = path.with_name("elsewhere.slm")
    target.mkdir()
    (target / "manifest.json").write_text("{}")
    path.symlink_to(target)


@pytest.mark.parametrize("make", [make_file, make_folder, make_link, Path.mkdir])
def test_what_is_no_bundle_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x.slm"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="not a bundle"):
        write(path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SlmError("no"), OSError(28, "No space left")])
@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("step", ["build_library", "_set_modes", "move_into_place"])
def test_after_an_error_everything_is_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    there_before: bool,
    error: BaseException,
) -> None:
    path = tmp_path / "x.slm"
    if there_before:
        write_bundle(path, [(Target.load("cortex-a72"), toy_decoder(toy_weights(seed=9)))])
    before = contents(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(writing, step, fail)
    with pytest.raises((SlmError, KeyboardInterrupt)):
        write(path)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([path] if there_before else [])


def test_a_missing_source_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"no\.onnx: cannot be read: No such file"):
        write(tmp_path / "x.slm", source=tmp_path / "no.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        write(tmp_path / "file" / "x.slm")


def test_a_bundle_needs_targets_with_names_of_their_own(tmp_path: Path) -> None:
    target = Target.load("cortex-a72")
    for plans, message in (([], "no target"), ([(target, toy_decoder())] * 2, "named twice")):
        with pytest.raises(BundleError, match=message):
            write_bundle(tmp_path / "x.slm", plans)


def test_missing_parent_folders_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "x.slm").verify()


def test_a_full_disk_names_the_path_that_was_asked_for_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        path = disk / "x.slm"
        with pytest.raises(BundleError, match=f"^{path}: cannot be written: No space left .*room"):
            write(path)
        assert list(disk.iterdir()) == []
