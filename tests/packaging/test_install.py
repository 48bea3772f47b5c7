"""slm-install: the version in use is whole and signed whatever happens, and one can go back."""

from __future__ import annotations

import http.server
import os
import random
import shutil
import signal
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from slmtvm.bundle.signature import key_signer
from slmtvm.packaging import Options, package
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import HOST, Device, repacked, state, tool
from tests.small_disk import small_disk

KILLS = 6  # by default


def test_a_package_is_installed_followed_by_the_next_and_taken_back(
    device: Device, release: Release
) -> None:
    assert device.succeed("install", release.tarball(1, HOST)) == (
        f"toy 1.1.0 (counter 1, {HOST}) is installed\n"
    )
    assert device.version() == "1.1.0"
    program = device.root / "toy/current/bin/slm-selftest"
    subprocess.run([program, device.root / "toy/current/bundle", "--seconds", "0"], check=True)
    device.succeed("install", release.tarball(2, HOST))
    assert device.version() == "1.2.0"
    assert device.succeed("status", "toy") == f"toy 1.2.0 counter 2 target {HOST} previous 1.1.0\n"
    assert device.succeed("rollback", "toy") == "toy: 1.1.0 is in use again\n"
    assert device.version() == "1.1.0"
    device.succeed("install", release.tarball(3, HOST))
    assert device.version() == "1.3.0"
    # What no link leads to any more is gone.
    assert {p.name for p in (device.root / "toy/versions").iterdir()} == {"1-1.1.0", "3-1.3.0"}
    assert "is installed already" in device.succeed("install", release.tarball(3, HOST))


@pytest.mark.slow
def test_an_older_version_is_taken_only_where_that_is_asked_for(
    device: Device, release: Release
) -> None:
    device.succeed("install", release.tarball(2, HOST))
    device.refuse("counter is 1, 2 was here before", "install", release.tarball(1, HOST))
    device.succeed("--allow-downgrade", "install", release.tarball(1, HOST))
    assert device.version() == "1.1.0"
    (device.root / "toy/counter").unlink()  # the version in use counts as well
    (device.root / "toy/current/package").write_text("counter 9\n")
    device.refuse("counter is 2, 9 was here", "install", release.tarball(2, HOST))


@pytest.mark.slow
def test_what_is_not_signed_by_a_trusted_key_is_refused(
    device: Device, release: Release, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    foreign = package(
        release.bundle(2), "tar.gz", tmp_path / "foreign.tar.gz", target=HOST,
        options=Options(key_signer(other_keys.private)),
    )  # fmt: skip
    unsigned = package(release.bundle(2), "tar.gz", tmp_path / "unsigned.tar.gz", target=HOST)
    device.refuse("not signed by a key of", "install", foreign)
    device.refuse("not signed", "install", unsigned)
    both = tmp_path / "both.pem"
    both.write_text(keys.public.read_text() + other_keys.public.read_text())
    device.keys = both
    device.succeed("install", foreign)
    device.keys = tmp_path / "none.pem"
    device.refuse("no public keys to trust", "install", release.tarball(3, HOST))


def test_openssl_takes_the_place_of_slm_verify(
    device: Device, release: Release, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    openssl = tool("openssl", "openssl")
    (device.programs / "slm-verify").unlink()
    if device.shell != ["sh"]:
        device.refuse("neither slm-verify", "install", release.tarball(1, HOST))
        (Path(device.path) / "openssl").symlink_to(openssl)
    both = tmp_path / "both.pem"
    both.write_text(other_keys.public.read_text() + keys.public.read_text())
    device.keys = both
    device.succeed("install", release.tarball(1, HOST))
    device.keys = other_keys.public
    device.refuse("not signed by a key of", "install", release.tarball(2, HOST))


def test_a_package_for_another_cpu_is_refused(device: Device, release: Release) -> None:
    device.refuse("for riscv64, this CPU is", "install", release.tarball(1, "riscv64-rvv"))


@pytest.mark.slow
def test_any_change_of_a_package_is_refused(
    device: Device, release: Release, tmp_path: Path
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    content = release.tarball(2, HOST).read_bytes()
    rng = random.Random(3)
    altered = tmp_path / "altered.tar.gz"
    before = state(device.root)
    for turn in range(16):
        at = rng.randrange(30, len(content))  # gzip's header has bytes without a meaning
        changed = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        altered.write_bytes(content[:at] if turn % 4 == 0 else changed)
        result = device.run("install", altered)
        assert result.returncode == 1, (at, turn, result.stdout)
        assert state(device.root) == before


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


PREFIX = f"toy-1.2.0-{HOST}"
HOSTILE = {
    "a file above": (entry("../../escaped"), b"x"),
    "a file at the root": (entry("/tmp/escaped-from-a-package"), b"x"),
    "a file above, deeper": (entry(f"{PREFIX}/bundle/../../../../escaped"), b"x"),
    "a symbolic link": (entry(f"{PREFIX}/link", tarfile.SYMTYPE, "/etc"), b""),
    "a link where a file is": (entry(f"{PREFIX}/bundle/weights.bin", tarfile.SYMTYPE, "/x"), b""),
    "a hard link": (entry(f"{PREFIX}/hard", tarfile.LNKTYPE, "/etc/passwd"), b""),
    "a device": (entry(f"{PREFIX}/null", tarfile.CHRTYPE), b""),
    "a pipe": (entry(f"{PREFIX}/pipe", tarfile.FIFOTYPE), b""),
    "a folder above": (entry(f"{PREFIX}/../above", tarfile.DIRTYPE), b""),
    "one more file": (entry(f"{PREFIX}/bin/more"), b"x"),
    "a file twice": (entry(f"{PREFIX}/bin/slm-verify"), b"x"),
    "a name with a line in it": (entry(f"{PREFIX}/bin/a\n-b"), b"x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_that_reaches_out_of_its_folder_is_refused_before_it_is_unpacked(
    what: str, device: Device, release: Release, tmp_path: Path
) -> None:
    device.root.mkdir()
    hostile = tmp_path / "hostile.tar.gz"
    repacked(release.tarball(2, HOST), hostile, lambda members: members.append(HOSTILE[what]))
    before = sorted(tmp_path.rglob("*"))
    result = device.run("install", hostile)
    assert result.returncode == 1, result.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert list(device.root.parent.rglob("*")) == [device.root]
    assert not Path("/tmp/escaped-from-a-package").exists()


def test_owners_and_permissions_are_not_those_of_an_archive_that_someone_packed_anew(
    device: Device, release: Release, tmp_path: Path
) -> None:
    def open_up(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for member, _ in members:
            member.uid = member.gid = 12345
            member.mode = 0o6777 if member.isfile() else 0o777

    archive = repacked(release.tarball(2, HOST), tmp_path / "open.tar.gz", open_up)
    device.succeed("install", archive)
    current = (device.root / "toy/current").resolve()
    for path in (current, *current.rglob("*")):
        status = path.stat()
        program = path.is_dir() or path.parent.name == "bin"
        assert stat.S_IMODE(status.st_mode) == (0o755 if program else 0o644), path
        assert status.st_uid == os.geteuid(), path


def test_a_file_without_any_package_in_it_is_refused(
    device: Device, release: Release, tmp_path: Path
) -> None:
    def rename(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for member, _ in members:
            member.name = member.name.replace(PREFIX, "..")

    (tmp_path / "text").write_text("no archive")
    (tmp_path / "empty").write_bytes(b"")
    repacked(release.tarball(2, HOST), tmp_path / "up", rename)
    repacked(release.tarball(2, HOST), tmp_path / "none", lambda members: members.clear())
    device.root.mkdir()
    for name in ("text", "empty", "up", "none"):
        device.refuse("not a package", "install", tmp_path / name)
    device.refuse("no such file", "install", tmp_path / "missing")


def test_a_version_whose_self_test_fails_is_not_used(
    device: Device, release: Release, tmp_path: Path
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    device.refuse(
        "toy 1.2.0 does not work here: nothing was changed",
        "--least-speed", "1e12", "install", release.tarball(2, HOST),
    )  # fmt: skip
    assert device.version() == "1.1.0"


@pytest.mark.slow
def test_the_version_before_comes_back_where_the_health_check_fails(
    device: Device, release: Release
) -> None:
    device.succeed("--health", "test -d", "install", release.tarball(1, HOST))
    device.refuse(
        "failed its health check: versions/1-1.1.0 is in use again",
        "--health", "test -f", "install", release.tarball(2, HOST),
    )  # fmt: skip
    assert device.version() == "1.1.0"


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_what_was_there(
    device: Device, release: Release, tmp_path: Path
) -> None:
    needed = sum(p.stat().st_size for p in release.bundle(1).rglob("*") if p.is_file())
    with small_disk(tmp_path / "disk", f"{needed * 2 // 1024 + 300}k") as disk:
        device.root = disk / "slm"
        device.succeed("install", release.tarball(1, HOST))
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(max(free - (100 << 10), 0)))
        device.refuse("kB are free, toy 1.2.0 takes", "install", release.tarball(2, HOST))
        filler.write_bytes(bytes(max(free - (8 << 10), 0)))
        result = device.run("install", release.tarball(2, HOST))
        assert result.returncode == 1
        filler.unlink()
        assert device.version() == "1.1.0"


@pytest.mark.slow
def test_two_at_a_time_are_one_too_many(device: Device, release: Release) -> None:
    device.root.mkdir()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    lock = device.root / ".lock"
    lock.symlink_to(f"{boot}.{os.getpid()}")
    device.refuse("another slm-install is at work, process", "install", release.tarball(1, HOST))
    lock.unlink()
    lock.symlink_to(f"of-before-a-restart.{os.getpid()}")
    device.succeed("install", release.tarball(1, HOST))
    lock.symlink_to(f"{boot}.999999999")  # killed
    device.succeed("install", release.tarball(2, HOST))
    assert not lock.is_symlink()


@pytest.mark.slow
def test_what_was_killed_after_the_switch_is_finished_by_the_next_try(
    device: Device, release: Release
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    device.succeed("install", release.tarball(2, HOST))
    folder = device.root / "toy"
    shutil.copytree(folder / "current", folder / "versions/0-1.0.0")
    (folder / "counter").write_text("1\n")
    device.succeed("install", release.tarball(2, HOST))
    assert len(list((folder / "versions").iterdir())) == 2
    assert (folder / "counter").read_text() == "2\n"


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(KILLS, marks=pytest.mark.slow),
        pytest.param(150, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_killed_at_any_moment_it_leaves_one_of_two_whole_versions(
    device: Device, release: Release, kills: int
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    begin = time.monotonic()
    device.succeed("install", release.tarball(2, HOST))
    whole = time.monotonic() - begin
    rng = random.Random(kills)
    found = set()
    for _ in range(kills):
        device.succeed("--allow-downgrade", "install", release.tarball(1, HOST))
        process = device.start("install", release.tarball(2, HOST))
        time.sleep(rng.uniform(0, whole * 1.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        version = device.version()
        assert version in ("1.1.0", "1.2.0")
        found.add(version)
        # And the next try succeeds, and cleans up.
        device.succeed("install", release.tarball(2, HOST))
        assert device.version() == "1.2.0"
        assert not list(device.root.glob(".install.*"))
        assert len(list((device.root / "toy/versions").iterdir())) <= 2
    assert "1.1.0" in found


class _Ranges(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` from the byte that is asked for; the first time only half of it."""

    content = b""
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:  # the library's name
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", f"{len(self.content) - begin}")
        if wanted:
            size = len(self.content)
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.write(self.content[begin : None if wanted else len(self.content) // 2])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_download_goes_on_where_it_was_cut(
    device: Device, release: Release, tmp_path: Path
) -> None:
    tool("wget", "wget")
    _Ranges.content = release.tarball(1, HOST).read_bytes()
    _Ranges.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, file = f"http://127.0.0.1:{server.server_port}/x.tar.gz", tmp_path / "x.tar.gz"
        for _ in range(3):
            if device.run("fetch", url, file).returncode == 0:
                break
            assert not file.exists()
        server.shutdown()
    assert file.read_bytes() == _Ranges.content
    assert any(asked == f"bytes={len(_Ranges.content) // 2}-" for asked in _Ranges.asked)


@pytest.mark.parametrize("words", [[], ["--root"], ["install"], ["--what", "status"], ["fly", "x"]])
def test_wrong_usage_shows_how(words: list[str], device: Device) -> None:
    result = device.run(*words)
    assert result.returncode == 64
    assert "slm-install [options] install FILE" in result.stderr


@pytest.mark.parametrize("name", ["..", "../toy", "", "-x", "other"])
def test_a_model_that_is_not_installed_is_named(
    name: str, device: Device, release: Release
) -> None:
    device.succeed("install", release.tarball(1, HOST))
    result = device.run("rollback", name)
    assert result.returncode == 1 and result.stderr.startswith("slm-install: ")
    device.refuse("no version before", "rollback", "toy")


@pytest.mark.slow
def test_what_serves_is_told_of_each_switch_and_keeps_the_version_that_it_takes(
    device: Device, release: Release, tmp_path: Path
) -> None:
    """The command stands for a server's reload: it notes what is in use, and takes no 1.3.0."""
    seen, command = tmp_path / "seen", tmp_path / "reload"
    command.write_text(
        "#!/bin/sh\n"
        f'version=$(sed -n "s/^version //p" {device.root}/toy/current/package)\n'
        f'echo "$version" >>{seen}\n[ "$version" != 1.3.0 ]\n'
    )  # fmt: skip
    command.chmod(0o755)
    reload = ("--reload", str(command))
    device.succeed(*reload, "install", release.tarball(1, HOST))
    device.succeed(*reload, "install", release.tarball(2, HOST))
    device.refuse(
        "1.3.0 was not taken by --reload: versions/2-1.2.0 is in use again",
        *reload, "install", release.tarball(3, HOST),
    )  # fmt: skip
    device.succeed(*reload, "rollback", "toy")
    device.refuse("failed its health check", *reload, "--health", "false", "install",
                  release.tarball(2, HOST))  # fmt: skip
    assert seen.read_text().split() == [
        "1.1.0", "1.2.0", "1.3.0", "1.2.0", "1.1.0", "1.2.0", "1.1.0",
    ]  # fmt: skip
    assert device.version() == "1.1.0"
