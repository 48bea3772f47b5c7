"""deb: for Debian, Ubuntu, Raspberry Pi OS, JetPack (deb(5), Debian policy)."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from slmtvm.errors import SlmError
from slmtvm.packaging.archive import write_tar
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.options import Options
from slmtvm.packaging.service import INSTALLERS, placed, service_unit

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}
# Files have one time, since Debian's checks take times before 1984 for errors: 2020-01-01.
_TIME = 1577836800
_DATE = "Wed, 01 Jan 2020 00:00:00 +0000"
_MAINTAINER = re.compile(r"[^<>\n]+ <[^<>@\s]+@[^<>@\s]+>")
_BLOCK = 1024  # bytes, of Installed-Size


def write_deb(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The package slm-NAME; raises SlmError where ``options.maintainer`` is not given."""
    (contents,) = several
    if not options.maintainer or not _MAINTAINER.fullmatch(options.maintainer):
        raise SlmError(
            "a Debian package names who answers for it: 'Your Name <you@example.org>'",
            where="--maintainer",
        )
    package = f"slm-{contents.name}"
    files = [placed(file, contents.name) for file in contents.files if file.path not in INSTALLERS]
    docs = f"usr/share/doc/{package}"
    extra = [
        (f"{docs}/changelog.gz", _changelog(contents, package, options.maintainer)),
        (f"{docs}/copyright", _copyright(contents, package)),
        (f"usr/share/lintian/overrides/{package}", _overrides(contents, package)),
        (f"usr/lib/systemd/system/{package}.service", service_unit(contents, package)),
    ]
    sums = {path: hashlib.md5(content).hexdigest() for path, content in extra}
    sums |= {file.path: _md5(file) for file in files}
    size = sum(-(-file.bytes // _BLOCK) for file in files) + len(extra) * 4
    control = [
        ("control", _control(contents, package, options.maintainer, size)),
        ("md5sums", "".join(f"{sums[path]}  {path}\n" for path in sorted(sums)).encode()),
    ]
    inner, data = BytesIO(), output.with_name("data.tar.xz")
    with lzma.open(inner, "wb") as packed:
        write_tar(packed, (), control, prefix="./", time=_TIME)
    # dpkg wants folders before what is in them, whatever made both.
    all_files = sorted([*files, *_written(extra, output.parent)], key=lambda file: file.path)
    with lzma.open(data, "wb") as packed:
        write_tar(packed, all_files, prefix="./", time=_TIME)
    with output.open("wb") as archive:
        archive.write(b"!<arch>\n")
        for name, content in (
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", inner.getvalue()),
            ("data.tar.xz", data.read_bytes()),
        ):
            header = f"{name:<16}{_TIME:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
            archive.write(header.encode() + content + b"\n" * (len(content) % 2))
    data.unlink()


def _written(extra: Sequence[tuple[str, bytes]], folder: Path) -> list[File]:
    made = []
    for number, (path, content) in enumerate(extra):
        source = folder / f"extra-{number}"
        source.write_bytes(content)
        made.append(File(path, source))
    return made


def _md5(file: File) -> str:
    return hashlib.md5(file.source.read_bytes()).hexdigest()


def _control(contents: Contents, package: str, maintainer: str, size: int) -> bytes:
    glibc = contents.entry.triple.partition("-gnu.")[2] or "2.28"
    requires = " ".join(contents.entry.requires) or "none"
    model = contents.bundle.manifest.model
    return (
        f"Package: {package}\n"
        f"Version: {contents.version}\n"
        f"Architecture: {ARCHITECTURES[contents.entry.arch]}\n"
        f"Maintainer: {maintainer}\n"
        f"Installed-Size: {size}\n"
        f"Depends: libc6 (>= {glibc})\n"
        "Section: misc\n"
        "Priority: optional\n"
        f"Description: compiled language model {contents.name}\n"
        f" A {model.get('family', 'language model')} {model['kind']} with a context of"
        f" {model['context']} tokens.\n"
        f" It is compiled for {contents.target}.\n"
        f" CPU features that it needs: {requires}.\n"
        " .\n"
        f" Its folder is /usr/lib/slm/{contents.name}: the library and weights\n"
        " in bundle, the interface in include, and bin/slm-selftest, which says\n"
        " whether this machine computes what it should.\n"
        " .\n"
        f" systemctl enable --now {package} serves it on 127.0.0.1, port 8080;\n"
        f" SLM_SERVE_OPTIONS in /etc/default/{package} are further options.\n"
    ).encode()


def _changelog(contents: Contents, package: str, maintainer: str) -> bytes:
    text = (
        f"{package} ({contents.version}) stable; urgency=medium\n\n"
        f"  * Release {contents.version}, counter {contents.counter}.\n\n"
        f" -- {maintainer}  {_DATE}\n"
    )
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def _copyright(contents: Contents, package: str) -> bytes:
    license = contents.license or "not stated by who made the package"
    return (
        f"{package}: the weights of {contents.name} and what was compiled of them.\n\n"
        f"Weights: {license}\n"
        "Copyright (c) the authors of the weights\n\n"
        "Code: slmtvm, under the Apache License 2.0, whose text is in\n"
        "/usr/share/common-licenses/Apache-2.0; static programs hold musl (MIT).\n"
        "All parts are listed in licenses.txt and sbom.cdx.json beside this file.\n"
    ).encode()


def _overrides(contents: Contents, package: str) -> bytes:
    lines = ["# Programs must run whatever libraries the system has."]
    lines += [
        f"{package}: statically-linked-binary [usr/lib/slm/{contents.name}/{file.path}]"
        for file in contents.programs
        if file.path not in INSTALLERS
    ]
    return ("\n".join(lines) + "\n").encode()
