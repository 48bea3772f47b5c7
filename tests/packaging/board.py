"""A board that qemu-system emulates: Debian's kernel, busybox, and a disk of ext4."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from slmtvm.codegen.zig import cache_folder
from tests.packaging.devices import tool

_FETCH_SECONDS, _BOOT_SECONDS = 300, 900
# In this order: a disk on virtio, ext4, and what they need.
_MODULES = (
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_mmio", "virtio_blk", "crc16", "crc32c_generic", "libcrc32c", "mbcache", "jbd2", "ext4",
)  # fmt: skip
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev; mount -t tmpfs t /tmp
while read m; do insmod /modules/$m.ko; done < /modules/order
i=0; while [ ! -b /dev/vda ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done
mount -t ext4 /dev/vda /mnt && cd /mnt && sh /run.sh
cd /; umount /mnt; sync; echo "=== off"; poweroff -f
"""


@dataclass(frozen=True)
class Machine:
    """What qemu-system emulates for an architecture of Debian's."""

    debian: str
    suite: str  # "": that of this machine
    qemu: str
    package: str
    cpu: str
    console: str


MACHINES = {
    "aarch64": Machine(
        "arm64", "", "qemu-system-aarch64", "qemu-system-arm", "cortex-a76", "ttyAMA0"
    ),
    "riscv64": Machine(
        "riscv64", "trixie", "qemu-system-riscv64", "qemu-system-misc",
        "rv64,v=true,vlen=128,vext_spec=v1.0", "ttyS0",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A command's exit status and what it wrote, to both streams."""

    code: int
    output: str


@dataclass(frozen=True)
class Board:
    """An emulated computer; its disk is an image that keeps what a run left."""

    machine: Machine
    folder: Path  # vmlinuz and initrd

    def boot(
        self,
        disk: Path,
        commands: Sequence[str],
        *,
        cpu: str | None = None,
        drive: Sequence[str] = (),
    ) -> list[Result]:
        """Start, run the shell ``commands`` one after the other in the disk's root, power off.

        ``cpu``: another one than the machine's. ``drive``: qemu's options for the disk.
        """
        with self._initrd(disk.parent, commands) as initrd:
            done = subprocess.run(
                self._command(disk, initrd, cpu or self.machine.cpu, drive),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=_BOOT_SECONDS,
            )  # fmt: skip
        console = done.stdout.decode(errors="replace").replace("\r", "")
        found = re.findall(r"^=== (\d+)\n(.*?)^=== end \d+ (\d+)$", console, re.S | re.M)
        assert len(found) == len(commands) and "\n=== off" in console, console
        return [Result(int(code), output) for _, output, code in found]

    @contextmanager
    def start(self, disk: Path, commands: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """Start as ``boot`` does, without waiting for the end: for power cuts."""
        with self._initrd(disk.parent, commands) as initrd:
            process = subprocess.Popen(
                self._command(disk, initrd, self.machine.cpu, ()), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            try:
                yield process
            finally:
                process.kill()
                process.communicate()

    @contextmanager
    def _initrd(self, folder: Path, commands: Sequence[str]) -> Iterator[Path]:
        """The board's own with /run.sh behind it, which the kernel unpacks as well."""
        script = _entry(1, "run.sh", stat.S_IFREG | 0o755, _script(commands).encode())
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write((self.folder / "initrd").read_bytes())
            file.write(bytes(-file.tell() % 4) + script + _entry(0, "TRAILER!!!", 0))
            file.flush()
            yield Path(file.name)

    def _command(self, disk: Path, initrd: Path, cpu: str, drive: Sequence[str]) -> list[str]:
        blocks = drive or ("-drive", f"if=none,id=d,format=raw,file={disk}")
        return [
            tool(self.machine.qemu, self.machine.package), "-M", "virt", "-cpu", cpu,
            "-m", "512", "-smp", "1", "-nographic", "-no-reboot", "-nic", "none", "-monitor",
            "none", "-serial", "stdio", "-accel", "tcg,thread=single",
            "-kernel", str(self.folder / "vmlinuz"), "-initrd", str(initrd),
            "-append", f"console={self.machine.console} quiet loglevel=1 panic=-1",
            *blocks, "-device", "virtio-blk-pci,drive=d",
        ]  # fmt: skip


@cache
def board(arch: str) -> Board:
    """The board of ``arch``; its kernel is fetched once. Skips where it cannot be had."""
    machine = MACHINES[arch]
    tool(machine.qemu, machine.package)
    kept = cache_folder().parent / "boards" / machine.debian
    if not (kept / "initrd").is_file():
        for name in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(name) is None:
                pytest.skip(f"no {name} here, which fetches the board's kernel; take Debian")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / "made"
            made.mkdir()
            _fetch(machine, Path(folder), made)
            shutil.rmtree(kept, ignore_errors=True)
            made.rename(kept)
    return Board(machine, kept)


def _fetch(machine: Machine, work: Path, made: Path) -> None:
    """Debian's kernel, modules and busybox for another machine, without this one's apt changing."""
    for name in ("lists/partial", "cache/archives/partial", "x"):
        (work / name).mkdir(parents=True)
    (work / "status").touch()
    arch = machine.debian
    options = [
        f"APT::Architecture={arch}", f"APT::Architectures::={arch}", f"Dir::State={work}",
        f"Dir::State::status={work}/status", f"Dir::State::lists={work}/lists",
        f"Dir::Cache={work}/cache", f"Dir::Etc::sourcelist={work}/sources.list",
        "Dir::Etc::sourceparts=-", "APT::Sandbox::User=root",
    ]  # fmt: skip
    given = [word for option in options for word in ("-o", option)]

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=_FETCH_SECONDS
        )
        if done.returncode != 0:
            last = (done.stderr.strip() or "?").splitlines()[-1]
            pytest.skip(f"no kernel for {arch} from Debian's archive: {command[0]}: {last}")
        return done.stdout

    # The mirror that this machine itself uses.
    sites = run(
        "apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)", "Created-By: Packages"
    )
    if not sites.strip():
        pytest.skip("apt has no sources here to fetch the board's kernel from")
    site, suite = sites.splitlines()[0].split()
    (work / "sources.list").write_text(f"deb [arch={arch}] {site} {machine.suite or suite} main\n")
    run("apt-get", *given, "-qq", "update")
    depends = run("apt-cache", *given, "depends", f"linux-image-{arch}")
    kernel = re.findall(r"Depends: (linux-image-[0-9]\S*)", depends)[0]
    run("apt-get", *given, "-qq", "download", kernel, "busybox-static")
    for package in work.glob("*.deb"):
        run("dpkg-deb", "-x", str(package), "x")
    (image,) = (work / "x/boot").glob("vmlinu*")
    image.rename(made / "vmlinuz")
    found = {p.name.split(".")[0].replace("-", "_"): p for p in (work / "x").rglob("*.ko*")}
    busybox = next(p for p in (work / "x").rglob("busybox") if p.parent.name == "bin")
    (made / "initrd").write_bytes(_initrd(busybox, {n: found[n] for n in _MODULES if n in found}))


def _initrd(busybox: Path, modules: dict[str, Path]) -> bytes:
    """What the kernel unpacks into memory and starts."""
    folders = ("bin", "proc", "sys", "dev", "tmp", "mnt", "modules")
    entries = [_entry(n, name, stat.S_IFDIR | 0o755) for n, name in enumerate(folders, 1)]
    entries.append(_entry(20, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(_entry(21, "bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries.append(_entry(22, "init", stat.S_IFREG | 0o755, _INIT.encode()))
    order = "".join(f"{name}\n" for name in modules).encode()
    entries.append(_entry(23, "modules/order", stat.S_IFREG | 0o644, order))
    for number, (name, path) in enumerate(modules.items(), 24):
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
        entries.append(_entry(number, f"modules/{name}.ko", stat.S_IFREG | 0o644, content))
    entries.append(_entry(0, "TRAILER!!!", 0))
    return gzip.compress(b"".join(entries), compresslevel=6, mtime=0)


def _entry(
    inode: int, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """One file of a cpio archive (newc)."""
    path = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def _script(commands: Iterable[str]) -> str:
    lines = []
    for number, command in enumerate(commands):
        inner = shlex.quote(command)
        lines.append(f"echo '=== {number}'; sh -c {inner} 2>&1; echo \"=== end {number} $?\"")
    return "\n".join(lines) + "\n"


def make_disk(image: Path, files: dict[str, Path], megabytes: int) -> None:
    """An ext4 file system in ``image`` with copies of ``files`` by their names, none mounted."""
    mke2fs = tool("mke2fs", "e2fsprogs")
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        for name, source in files.items():
            place = Path(folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
        os.chmod(folder, 0o755)
        _quietly(mke2fs, "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0,lazy_itable_init=0",
                 "-d", folder, str(image), f"{megabytes}M")  # fmt: skip


def unpack_tools(package: Path, folder: Path) -> dict[str, Path]:
    """slm-install and slm-verify of a package, unpacked into ``folder``, by their disk paths."""
    found = {}
    with tarfile.open(package) as tar:
        for member in tar:
            name = Path(member.name).name
            if name in ("slm-install", "slm-verify"):
                member.name = name
                tar.extract(member, folder, filter="data")
                found[f"bin/{name}"] = folder / name
    return found


def take(image: Path, folder: Path, name: str) -> Path:
    """The folder ``name`` of the file system in ``image``, copied below ``folder``, which is made.

    As after a power cut: the journal is replayed, and the file system must then be sound.
    """
    checked = subprocess.run(
        [tool("e2fsck", "e2fsprogs"), "-fy", str(image)], capture_output=True, text=True
    )
    assert checked.returncode in (0, 1), checked.stdout
    folder.mkdir()
    _quietly(tool("debugfs", "e2fsprogs"), "-R", f"rdump {name} {folder}", str(image))
    return folder / name


def _quietly(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
