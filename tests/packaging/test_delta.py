"""A delta makes the new package of the old one, on the device, and nothing else."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from pathlib import Path

import pytest

from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import key_signer
from slmtvm.errors import SlmError
from slmtvm.packaging import Options, package
from slmtvm.packaging.delta import Part, _blocks, find_parts, write_delta
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, Device, repacked


def joined(old: bytes, new: bytes, parts: list[Part]) -> bytes:
    return b"".join((old if p.old else new)[p.offset : p.offset + p.size] for p in parts)


@pytest.mark.parametrize("seed", range(12))
def test_any_content_is_made_of_its_parts(seed: int) -> None:
    rng = random.Random(seed)
    old = rng.randbytes(rng.randrange(300_000))
    pieces = [old]
    for _ in range(rng.randrange(5)):  # moved by multiples of 64, changed, cut, repeated
        at = rng.randrange(len(old) // 64 + 1) * 64
        pieces = [b"".join(pieces)]
        content = pieces[0]
        change = rng.choice(
            [rng.randbytes(64 * rng.randrange(9)), bytes(rng.randrange(99_999)), b""]
        )
        pieces = [content[:at], change, content[at + rng.choice([0, len(change), 64]) :]]
    new = b"".join(pieces)
    parts = find_parts(old, new)
    assert joined(old, new, parts) == new
    assert all(part.offset % 64 == 0 for part in parts if part.old)


def test_what_moved_by_a_segment_is_found() -> None:
    old = random.Random(0).randbytes(200_000)
    parts = find_parts(old, bytes(64) + old[:128_000] + b"x" * 640 + old[128_000:])
    assert sum(part.size for part in parts if not part.old) < 1000


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (64, 640), (1 << 20, 5 << 20), (192, 99_999)])
def test_blocks_cover_a_piece(offset: int, size: int) -> None:
    at = offset
    for block, skip, count in _blocks(offset, size):
        assert block * skip == at and count > 0 and block <= 1 << 20
        at += block * count
    assert at == offset + size


@pytest.fixture(scope="module")
def renewed(release: Release, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the first release's weights with a newer counter."""
    folder = tmp_path_factory.mktemp("renewed")
    bundle = shutil.copytree(release.bundle(1), folder / "toy.slm")
    signer = key_signer(keys.private)
    sign_bundle(bundle, signer, counter=8, version="1.8.0")
    return package(bundle, "tar.gz", folder / "new.tar.gz", target=HOST, options=Options(signer))


@pytest.mark.slow
def test_a_delta_installs_what_the_package_would(
    device: Device,
    release: Release,
    renewed: Path,
    tmp_path: Path,
) -> None:
    old = release.tarball(1, HOST)
    delta = write_delta(old, renewed, tmp_path / "delta.tar.gz")
    assert delta.stat().st_size < renewed.stat().st_size / 5
    device.refuse("cannot be applied here", "install", delta)
    device.succeed("install", old)
    device.succeed("install", delta)
    assert device.version() == "1.8.0"
    with tarfile.open(renewed) as tar:
        wanted = {m.name.partition("/")[2]: (m.mode, (tar.extractfile(m) or io.BytesIO()).read())
                  for m in tar if m.isfile()}  # fmt: skip
    current = device.root / "toy/current"
    files = [path for path in current.resolve().rglob("*") if path.is_file()]
    found = {
        path.relative_to(current.resolve()).as_posix(): (path.stat().st_mode & 0o777,
                                                         path.read_bytes())
        for path in files
    }  # fmt: skip
    assert found == wanted
    device.refuse("not from the version that is in use", "--allow-downgrade", "install",
                  write_delta(old, release.tarball(2, HOST), tmp_path / "d2.tar.gz"))  # fmt: skip


@pytest.mark.slow
def test_a_delta_of_other_weights_installs_and_a_changed_one_does_not(
    device: Device,
    release: Release,
    tmp_path: Path,
) -> None:
    delta = write_delta(release.tarball(1, HOST), release.tarball(2, HOST), tmp_path / "d.tar.gz")
    device.succeed("install", release.tarball(1, HOST))

    def wrong(kind: str) -> Path:
        def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
            for number, (member, content) in enumerate(members):
                if kind == "recipe" and member.name.endswith("/delta"):
                    assert b"copy include/slm.h " in content
                    changed = content.replace(b"copy include/slm.h ", b"copy package ")
                    members[number] = (member, changed)
                if kind == "outside" and member.name.endswith("/delta"):
                    members[number] = (member, content + b"copy package ../../../../escaped\n")
                if kind == "weights" and "weights.bin" in member.name:
                    members[number] = (member, content[:-1] + b"\x7f")
                if kind == "more" and member.name.endswith("/delta"):
                    member.name = member.name.replace("/delta", "/other")

        return repacked(delta, tmp_path / f"{kind}.tar.gz", change)

    for kind in ("recipe", "outside", "weights", "more"):
        result = device.run("install", wrong(kind))
        assert result.returncode == 1, kind
        assert device.version() == "1.1.0"
    assert not list(tmp_path.rglob("escaped")) and not (device.root.parent / "escaped").exists()
    device.succeed("install", delta)
    assert device.version() == "1.2.0"


@pytest.mark.slow
def test_what_is_no_pair_of_packages_is_named(release: Release, keys: Keys, tmp_path: Path) -> None:
    one = release.tarball(1, HOST)
    unsigned = package(release.bundle(1), "tar.gz", tmp_path / "u.tar.gz", target=HOST)
    other = package(
        release.bundle(1), "tar.gz", tmp_path / "o.tar.gz", target=HOST, name="other",
        options=Options(key_signer(keys.private)),
    )  # fmt: skip
    (tmp_path / "text").write_text("no archive")
    for new, message in (
        (unsigned, "is not signed"),
        (other, "not of the same name"),
        (release.tarball(1, "cortex-a78"), "not of the same target"),
        (tmp_path / "text", "cannot be read as a package"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(SlmError, match=message):
            write_delta(one, new, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
