"""slm-install without power: whatever cut a board's disk meets, a whole version is in use."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from slmtvm.bundle.signature import PublicKeys, key_signer
from tests.packaging.board import board, make_disk, take, unpack_tools
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import emulator, released, version_in_use

ARCH, TARGET = "aarch64", "cortex-a78"
INSTALL = "/mnt/bin/slm-install --root /mnt/models --keys /mnt/keys.pem install"
VERSIONS = (None, "1.1.0", "1.2.0")  # in this order
MEGABYTES = 24

# The log of dm-log-writes (the kernel's documentation has the format), which qemu writes as well.
_MAGIC, _FLUSH, _DISCARD = 0x6A736677736872, 1, 4


@dataclass(frozen=True)
class Write:
    """``content`` came to the disk at ``offset``; with ``flushes``, all before it is on it."""

    offset: int
    content: bytes
    flushes: bool


def writes(log: Path) -> Iterator[Write]:
    data = memoryview(log.read_bytes())
    magic, version, entries, sector = struct.unpack_from("<QQQI", data)
    assert (magic, version) == (_MAGIC, 1)
    at = sector
    for _ in range(entries):
        place, sectors, flags, _ = struct.unpack_from("<QQQQ", data, at)
        at += sector
        size = sectors * sector
        content = bytes(size) if flags & _DISCARD else bytes(data[at : at + size])
        at += 0 if flags & _DISCARD else size
        yield Write(place * sector, content, bool(flags & _FLUSH))


@pytest.fixture(scope="module")
def files(
    release: Release, keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What lies on the board's disk at first: two releases, and what installs them."""
    folder = tmp_path_factory.mktemp("cuts")
    first = folder / "1.tar.gz"
    shutil.copy(release.tarball(1, TARGET), first)
    second = released(first, folder / "2.tar.gz", key_signer(keys.private),
                      counter=2, version="1.2.0")  # fmt: skip
    found = {"keys.pem": keys.public, first.name: first, second.name: second}
    return {**found, **unpack_tools(first, folder)}


def whole_version(image: Path, keys: Keys, *, runs: bool = False) -> str | None:
    """The version in use on a disk after a power cut, all of it signed; None: there is none yet.

    ``runs``: its self-test must succeed as well.
    """
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        models = take(image, Path(folder) / "out", "models")
        current = models / "toy" / "current"
        if not current.is_symlink():
            return None
        trusted = PublicKeys.read(keys.public)
        trusted.check((current / "package").read_bytes(), current / "package.sig", "package")
        if runs:
            test = [*emulator(TARGET), current / "bin/slm-selftest", current / "bundle"]
            subprocess.run([*test, "--seconds", "0", "--threads", "1"], check=True,
                           capture_output=True)  # fmt: skip
        return version_in_use(models)


@pytest.mark.parametrize(
    "subsets", [pytest.param(0.1, marks=pytest.mark.slow),
                pytest.param(3, marks=[pytest.mark.slow, pytest.mark.exhaustive])],
)  # fmt: skip
def test_a_power_cut_at_any_moment_leaves_a_whole_version(
    subsets: float, files: dict[str, Path], keys: Keys
) -> None:
    """``subsets``: of what was not flushed when the power failed, tried for each flush."""
    rng = random.Random(17)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        disk, log, image = (Path(folder) / name for name in ("disk", "log", "image"))
        make_disk(disk, files, MEGABYTES)
        content = bytearray(disk.read_bytes())
        log.touch()
        logged = (
            "-blockdev", f"driver=file,node-name=disk,filename={disk}",
            "-blockdev", f"driver=file,node-name=log,filename={log}",
            "-blockdev", "driver=blklogwrites,node-name=d,file=disk,log=log",
        )  # fmt: skip
        results = board(ARCH).boot(
            disk, [f"{INSTALL} 1.tar.gz", f"{INSTALL} 2.tar.gz"], drive=logged
        )
        assert [result.code for result in results] == [0, 0], results

        reached, seen, tried = 0, set(), count()

        def cut(lost: bool) -> None:
            """Power fails here; with ``lost``, any of what was not flushed is on the disk."""
            nonlocal reached
            found = bytearray(content) if lost else content
            for write in pending if lost else ():
                if rng.random() < 0.5:
                    found[write.offset : write.offset + len(write.content)] = write.content
            image.write_bytes(found)
            version = VERSIONS.index(whole_version(image, keys, runs=next(tried) % 16 == 0))
            # What was in use at the last flush, or what is to be next; never back.
            assert version in (reached, reached + 1), (version, reached)
            if not lost:
                reached = version
            seen.add(version)

        pending: list[Write] = []
        flushes = 0
        for write in writes(log):
            if write.flushes and pending:
                for turn in range(max(1, round(subsets))):
                    if turn + rng.random() < subsets:
                        cut(lost=True)
                for earlier in pending:
                    end = earlier.offset + len(earlier.content)
                    content[earlier.offset : end] = earlier.content
                pending = []
                flushes += 1
                if subsets >= 1 or rng.random() < subsets:
                    cut(lost=False)
            if write.content:
                pending.append(write)
        assert not pending  # whoever said that it is installed had flushed everything
        cut(lost=False)
        print(f"{flushes} flushes, {next(tried)} power cuts")
        assert reached == 2
        assert subsets < 1 or seen == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_board_killed_at_any_moment_has_a_whole_version(
    files: dict[str, Path], keys: Keys
) -> None:
    rng = random.Random(3)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        disk, copy = Path(folder) / "disk", Path(folder) / "copy"
        make_disk(disk, files, MEGABYTES)
        results = board(ARCH).boot(disk, [f"{INSTALL} 1.tar.gz"])
        assert results[0].code == 0
        before, seen = disk.read_bytes(), set()
        for turn in range(20):
            disk.write_bytes(before)
            with board(ARCH).start(disk, ["echo begun", f"{INSTALL} 2.tar.gz"]) as process:
                assert process.stdout is not None
                while "begun" not in (line := process.stdout.readline()):
                    assert line, "it ended before anything"
                time.sleep(rng.uniform(0, 4))
            copy.write_bytes(disk.read_bytes())
            version = whole_version(copy, keys, runs=turn % 5 == 0)
            assert version in VERSIONS[1:]
            seen.add(version)
        # And the next start goes on from what the last kill left.
        (again,) = board(ARCH).boot(disk, [f"{INSTALL} 2.tar.gz"])
        assert again.code == 0, again
        assert whole_version(disk, keys, runs=True) == "1.2.0"
        assert "1.1.0" in seen


def _memory() -> str | None:
    """Where what is written is soon there."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
