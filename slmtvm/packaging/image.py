"""image: the model in a copy of a root file system, none mounted: an ext4 image, alone or as a
partition of a disk's image, or a tar archive.

It lies where slm-install would have put it, with slm-install, so that updates can follow.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from slmtvm.errors import SlmError
from slmtvm.packaging.command import run
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.options import Options, given
from slmtvm.packaging.partitions import Partition, read_partitions
from slmtvm.packaging.tarball import DESCRIPTION, DESCRIPTION_SIGNATURE, describe

ROOT = "opt/slm"
_TOOLS = {"bin/slm-install": "usr/bin/slm-install", "bin/slm-verify": "usr/bin/slm-verify"}
_EXT_MAGIC, _EXT_MAGIC_AT = b"\x53\xef", 1080
_COPIED = 1 << 20  # bytes at a time
_SPARE = 64  # blocks for what ext4 needs besides files' contents


def write_image(several: Sequence[Contents], output: Path, options: Options) -> None:
    """A copy of ``options.into`` with the model in it; raises SlmError where it has no room."""
    (contents,) = several
    source = given(options.into, "--into", "the root file system that the model is put into")
    files, links = _laid_out(contents, options, output.parent)
    if _is_ext(source):  # which begins with zeros, as an empty archive does
        shutil.copyfile(source, output)
        _into_ext(output, files, links, f"{source}")
    elif partitions := read_partitions(source):
        _into_disk(source, partitions, output, files, links)
    elif tarfile.is_tarfile(source):
        _into_tar(source, files, links, output)
    else:
        raise SlmError(
            "is neither an ext4 image, nor a disk with partitions, nor a tar archive",
            where=f"{source}",
        )


def _into_disk(
    source: Path, partitions: list[Partition], output: Path, files: list[File],
    links: dict[str, str],
) -> None:  # fmt: skip
    """Into the one partition that is a root file system: ext4, with a folder /etc."""
    part = output.with_name("partition.ext4")
    roots = []
    for partition in partitions:
        if _is_ext(source, partition.begin):
            _copy(source, partition.begin, part, 0, partition.size)
            if _exists(part, "etc"):
                roots.append(partition)
    if len(roots) != 1:
        numbers = ", ".join(f"{p.number}" for p in roots)
        raise SlmError(
            f"has {len(partitions)} partitions, of which "
            + (f"{numbers} are" if roots else "none is")
            + " a root file system of ext4; take the one that is meant out of it",
            where=f"{source}",
        )
    (root,) = roots
    _copy(source, root.begin, part, 0, root.size)
    _into_ext(part, files, links, f"{source}, partition {root.number}")
    shutil.copyfile(source, output)
    _copy(part, 0, output, root.begin, root.size)
    part.unlink()


def _copy(source: Path, begin: int, target: Path, to: int, size: int) -> None:
    """Bytes of a file into another one, which is begun anew where ``to`` is 0."""
    with source.open("rb") as old, target.open("r+b" if to else "wb") as new:
        old.seek(begin)
        new.seek(to)
        while size:
            block = old.read(min(size, _COPIED))
            if not block:
                raise SlmError("ends too early", where=f"{source}")
            new.write(block)
            size -= len(block)


def _laid_out(
    contents: Contents, options: Options, folder: Path
) -> tuple[list[File], dict[str, str]]:
    """What slm-install makes of a package: files by their paths, and links."""
    if options.signer is None:
        raise SlmError("must be given, so that updates can follow what is signed", where="--key")
    model = f"{ROOT}/{contents.name}"
    version = f"versions/{contents.counter}-{contents.version}"
    description = describe(contents)
    made = {
        f"{model}/{version}/{DESCRIPTION}": description,
        f"{model}/{version}/{DESCRIPTION_SIGNATURE}": options.signer(description),
        f"{model}/counter": f"{contents.counter}\n".encode(),
    }
    files = [File(f"{model}/{version}/{f.path}", f.source, f.program) for f in contents.files]
    files += [
        File(_TOOLS[f.path], f.source, program=True) for f in contents.files if f.path in _TOOLS
    ]
    for number, (path, content) in enumerate(made.items()):
        source = folder / f"made-{number}"
        source.write_bytes(content)
        files.append(File(path, source))
    return sorted(files, key=lambda f: f.path), {f"{model}/current": version}


def _into_tar(source: Path, files: list[File], links: dict[str, str], output: Path) -> None:
    """Entries of ``source`` and then ours, in an archive that is not compressed."""
    try:
        with (
            tarfile.open(source) as old,
            tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as new,
        ):
            there = {}
            dotted = False
            for entry in old:
                dotted = dotted or entry.name.startswith("./")
                there[_plain(entry.name)] = entry
                new.addfile(entry, old.extractfile(entry) if entry.isreg() else None)
            places = {f.path for f in files} | set(links)
            taken = sorted(places & set(there))
            if taken:
                raise SlmError(f"has {taken[0]} already", where=f"{source}")
            prefix = "./" if dotted else ""
            for path in _folders(places):
                kind = there.get(path)
                if kind is not None and not kind.isdir() and not kind.issym():
                    raise SlmError(f"has no folder at {path}", where=f"{source}")
                if kind is None:
                    new.addfile(_entry(prefix + path, tarfile.DIRTYPE, 0o755))
            for file in files:
                entry = _entry(prefix + file.path, tarfile.REGTYPE, file.mode)
                entry.size = file.bytes
                with file.source.open("rb") as content:
                    new.addfile(entry, content)
            for path, target in links.items():
                entry = _entry(prefix + path, tarfile.SYMTYPE, 0o777)
                entry.linkname = target
                new.addfile(entry)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise SlmError(f"cannot be read as a tar archive: {error}", where=f"{source}") from error


def _plain(name: str) -> str:
    return name.removeprefix("./").strip("/")


def _entry(path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode = kind, mode
    entry.uname = entry.gname = "root"
    return entry


def _folders(places: set[str]) -> list[str]:
    """All folders above ``places``, the outer ones first."""
    found = {f"{p}" for place in places for p in PurePosixPath(place).parents} - {"."}
    return sorted(found)


def _is_ext(path: Path, begin: int = 0) -> bool:
    with path.open("rb") as file:
        file.seek(begin + _EXT_MAGIC_AT)
        return file.read(len(_EXT_MAGIC)) == _EXT_MAGIC


def _into_ext(image: Path, files: list[File], links: dict[str, str], where: str) -> None:
    """Write into the file system by debugfs, and have e2fsck check what came about."""
    places = {f.path for f in files} | set(links)
    folders = _folders(places)
    there = {p for p in (*folders, *places) if _exists(image, p)}
    if taken := sorted(there & places):
        raise SlmError(f"has {taken[0]} already", where=where)
    lines = [f"mkdir /{path}" for path in folders if path not in there]
    for file in files:
        lines.append(f"write {_quoted(file.source.absolute())} /{file.path}")
        lines += [f"set_inode_field /{file.path} {field} {value}"
                  for field, value in (("mode", f"0{0o100000 | file.mode:o}"), ("uid", "0"),
                                       ("gid", "0"))]  # fmt: skip
    lines += [f"symlink /{path} {target}" for path, target in links.items()]
    _check_room(image, sum(f.bytes for f in files), len(lines), where)
    script = image.with_name("debugfs.script")
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run("debugfs", "e2fsprogs", "-w", "-f", script, image)
    script.unlink()
    missing = [p for p in sorted(places) if not _exists(image, p)]
    if missing:
        raise SlmError(f"{missing[0]} cannot be written into it", where=where)
    run("e2fsck", "e2fsprogs", "-fn", image)


def _exists(image: Path, path: str) -> bool:
    return "Inode:" in run("debugfs", "e2fsprogs", "-R", f"stat /{path}", image)


def _quoted(path: Path) -> str:
    if '"' in f"{path}" or "\n" in f"{path}":
        raise SlmError("debugfs takes no such name", where=f"{path}")
    return f'"{path}"'


def _check_room(image: Path, size: int, entries: int, where: str) -> None:
    facts = dict(
        line.split(":", 1) for line in run("dumpe2fs", "e2fsprogs", "-h", image).splitlines()
        if ":" in line
    )  # fmt: skip
    block = int(facts["Block size"])
    free = (int(facts["Free blocks"]) - _SPARE) * block
    needed = size + entries * block
    if free < needed or int(facts["Free inodes"]) < entries:
        raise SlmError(
            f"has room for {max(free, 0):,} bytes, the model takes {needed:,}; make it larger "
            "(resize2fs)",
            where=where,
        )
