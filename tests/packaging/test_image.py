"""A model in an image of a root file system is as if slm-install had put it there."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slmtvm.errors import SlmError
from slmtvm.packaging import Options
from slmtvm.packaging.contents import Contents
from tests.packaging.board import make_disk, take
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, Device, tool, version_in_use
from tests.packaging.test_formats import check, succeed
from tests.packaging.updaters import write


@pytest.mark.slow
def test_a_model_in_a_tar_of_a_root_is_as_if_installed(
    contents: Contents, options: Options, keys: Keys, release: Release, root_tar: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    image = write("image", contents, replace(options, into=root_tar), tmp_path / "o" / "new.tar")
    root = tmp_path / "root"
    root.mkdir()
    succeed("tar", "-C", root, "-xf", image)
    assert (root / "etc/hostname").read_text() == "board\n"
    assert os.readlink(root / "bin") == "usr/bin"
    same = write("tar.gz", contents, options, tmp_path / "t" / "same.tar.gz")
    updated_by_slm_install(root / "opt/slm", root / "usr/bin", keys, release, same)


def updated_by_slm_install(
    models: Path, programs: Path, keys: Keys, release: Release, same: Path
) -> None:
    """What is in ``models`` is that of the package ``same``, takes an update and goes back."""
    assert version_in_use(models) == "1.1.0"
    check(models / "toy/current/bin/slm-selftest", models / "toy/current/bundle", keys)
    device = Device(models, keys.public, programs, ["sh"], os.environ["PATH"])
    assert "installed already" in device.succeed("install", same)
    device.succeed("install", release.tarball(2, HOST))
    device.succeed("rollback", "toy")
    assert device.version() == "1.1.0"


@pytest.fixture
def root_ext4(root_tar: Path, tmp_path: Path) -> Path:
    path = tmp_path / "rootfs.ext4"
    make_disk(path, {"etc/hostname": tmp_path / "rootfs/etc/hostname"}, 24)
    return path


@pytest.mark.slow
def test_a_model_in_an_ext4_image_is_as_if_installed(
    contents: Contents, options: Options, keys: Keys, release: Release, root_ext4: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    image = write("image", contents, replace(options, into=root_ext4), tmp_path / "o" / "new.ext4")
    again = write("image", contents, replace(options, into=root_ext4), tmp_path / "p" / "new.ext4")
    assert image.read_bytes() == again.read_bytes()
    assert b"board" in take(image, tmp_path / "etc", "etc").joinpath("hostname").read_bytes()
    models = take(image, tmp_path / "opt", "opt") / "slm"
    programs = take(image, tmp_path / "usr", "usr") / "bin"
    assert (models / "toy/current/bin/slm-selftest").stat().st_uid == 0
    same = write("tar.gz", contents, options, tmp_path / "t" / "same.tar.gz")
    updated_by_slm_install(models, programs, keys, release, same)


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_a_model_in_the_root_partition_of_a_disk_leaves_the_others(
    table: str, contents: Contents, options: Options, root_ext4: Path, tmp_path: Path
) -> None:
    disk, boot, root = tmp_path / "disk.img", 4096, 8192  # sectors
    sfdisk = tool("sfdisk", "fdisk")
    with disk.open("wb") as file:
        file.truncate((root + 2048) * 512 + root_ext4.stat().st_size + (1 << 20))
    layout = f"label: {table}\nstart={boot}, size=2048\nstart={root}, size={24 * 2048}\n"
    done = subprocess.run([sfdisk, "-q", disk], input=layout, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    with disk.open("r+b") as file:
        file.seek(boot * 512)
        file.write(b"boot" * 1000)
        file.seek(root * 512)
        file.write(root_ext4.read_bytes())
    image = write("image", contents, replace(options, into=disk), tmp_path / "o" / "new.img")
    before, after = disk.read_bytes(), image.read_bytes()
    begin, end = root * 512, (root + 24 * 2048) * 512
    assert after[:begin] == before[:begin] and after[end:] == before[end:]
    alone = write("image", contents, replace(options, into=root_ext4), tmp_path / "p" / "new.ext4")
    assert after[begin:end] == alone.read_bytes()
    with disk.open("r+b") as file:  # without a root file system
        file.seek(root * 512 + 1080)
        file.write(b"no")
    with pytest.raises(SlmError, match="has 2 partitions, of which none is a root file system"):
        write("image", contents, replace(options, into=disk), tmp_path / "q" / "new.img")
    short = tmp_path / "short.img"
    short.write_bytes(before[: begin + 5000])
    with pytest.raises(SlmError, match="partition 2 ends beyond the image"):
        write("image", contents, replace(options, into=short), tmp_path / "r" / "new.img")


def test_an_image_without_room_or_with_the_model_in_it_is_left_as_it_is(
    contents: Contents, options: Options, root_tar: Path, root_ext4: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.ext4"
    make_disk(small, {"etc/hostname": tmp_path / "rootfs/etc/hostname"}, 2)
    before = small.read_bytes()
    text = tmp_path / "text"
    text.write_text("no image" * 300)
    for into, message in (
        (small, "has room for"),
        (text, "neither an ext4 image, nor a disk with partitions, nor a tar archive"),
        (tmp_path / "missing", "no such file, which is the root file system"),
        (None, "--into: must be given"),
    ):  # fmt: skip
        with pytest.raises(SlmError, match=message):
            write("image", contents, replace(options, into=into), tmp_path / "x" / "out")
    assert small.read_bytes() == before
    for number, source in enumerate((root_tar, root_ext4)):
        once = write(
            "image", contents, replace(options, into=source), tmp_path / f"{number}" / "once"
        )
        with pytest.raises(SlmError, match=r"has opt/slm/toy/.* already"):
            write("image", contents, replace(options, into=once), tmp_path / "twice" / "out")
