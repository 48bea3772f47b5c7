"""The devices that packages are tried on: this machine, and two that qemu-user emulates."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slmtvm.bundle.signature import Signer
from slmtvm.target import Target
from tests.emulation.session import static_emulator

TARGETS = ("cortex-a78", "riscv64-rvv")
HOST = Target.load("host").name
DEVICES = (HOST, *TARGETS)


def emulator(name: str) -> list[str]:
    """What a static program of target ``name`` is started with here; skips where nothing can."""
    return static_emulator(Target.load(name))


def tool(name: str, package: str) -> str:
    """The path of the program ``name``; skips, naming the Debian package, where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; on Debian and Ubuntu: apt install {package}")
    return path


@dataclass
class Device:
    """A root that versions are installed in, and what runs the script."""

    root: Path
    keys: Path
    programs: Path
    shell: list[str]
    path: str
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [*self.shell, self.programs / "slm-install", "--root", self.root,
                   "--keys", self.keys, *arguments]  # fmt: skip
        return subprocess.Popen(
            list(map(str, command)), env={"PATH": self.path, **self.variables}, text=True,
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def succeed(self, *arguments: str | Path) -> str:
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def refuse(self, message: str, *arguments: str | Path) -> None:
        """The command must end with an error that says ``message`` and leave nothing."""
        before = state(self.root)
        result = self.run(*arguments)
        assert result.returncode == 1 and message in result.stderr, result.stdout + result.stderr
        assert state(self.root) == before

    def version(self) -> str:
        """The version in use, after comparing it with what was signed, file by file."""
        return version_in_use(self.root)


def version_in_use(root: Path) -> str:
    """The version of the toy in use below ``root``, all its files those that were signed."""
    current = root / "toy" / "current"
    lines = (current / "package").read_text().splitlines()
    sums = [line.split() for line in lines if line.startswith("file ")]
    check = "".join(f"{digest}  {path}\n" for _, _, digest, _, path in sums)
    subprocess.run(["sha256sum", "-c", "--quiet"], cwd=current, input=check, text=True, check=True)
    return next(line.removeprefix("version ") for line in lines if line.startswith("version"))


def state(root: Path) -> list[tuple[str, bytes | str]]:
    """All files and links below a root but for its lock."""
    found: list[tuple[str, bytes | str]] = []
    for path in sorted(root.rglob("*")) if root.exists() else []:
        if path.is_symlink():
            found.append((str(path), os.readlink(path)))
        elif path.is_file():
            found.append((str(path), path.read_bytes()))
    return found


def repacked(
    source: Path, output: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]
) -> Path:
    """A copy of a package whose members were changed by someone without the key."""
    with tarfile.open(source) as tar:
        members = [(m, (tar.extractfile(m) or io.BytesIO()).read() if m.isfile() else b"")
                   for m in tar]  # fmt: skip
    change(members)
    with tarfile.open(output, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return output


def released(source: Path, output: Path, signer: Signer, **fields: object) -> Path:
    """A copy of a package whose signed description has other ``fields``: another release of it."""

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        places = {Path(member.name).name: at for at, (member, _) in enumerate(members)}
        entry, content = members[places["package"]]
        lines = content.decode().splitlines()
        for number, line in enumerate(lines):
            name = line.partition(" ")[0]
            lines[number] = f"{name} {fields[name]}" if name in fields else line
        description = ("\n".join(lines) + "\n").encode()
        members[places["package"]] = (entry, description)
        signature, _ = members[places["package.sig"]]
        members[places["package.sig"]] = (signature, signer(description))

    return repacked(source, output, change)
