"""wheel: `pip install model.whl`, `import model`, on a board without TVM or slmtvm (PEP 427)."""

from __future__ import annotations

import base64
import hashlib
import re
import stat
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from slmtvm.errors import SlmError
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.file import File
from slmtvm.packaging.options import Options
from slmtvm.packaging.service import INSTALLERS

_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say
_CHUNK = 1 << 20


def wheel_name(contents: Contents) -> str:
    """The file's name, which pip goes by: it says where the wheel can be installed."""
    return f"{_module(contents)}-{contents.version}-py3-none-{platform_tag(contents)}.whl"


def platform_tag(contents: Contents) -> str:
    """manylinux_2_28_aarch64 and such, of what the library is linked for (PEP 600)."""
    major, _, minor = (contents.entry.triple.partition("-gnu.")[2] or "2.28").partition(".")
    return f"manylinux_{major}_{minor}_{contents.entry.arch}"


def write_wheel(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The wheel: a module with the bundle and a ctypes binding that needs nothing else."""
    (contents,) = several
    module = _module(contents)
    if module in {"slmtvm", "numpy", "tokenizers"}:
        raise SlmError(f"{module!r} is the name of another module", where="--name")
    info = f"{module}-{contents.version}.dist-info"
    binding = (resources.files("slmtvm.packaging") / "binding.py").read_bytes()
    made = {
        f"{module}/__init__.py": binding,
        f"{module}/py.typed": b"",
        f"{info}/METADATA": _metadata(contents),
        f"{info}/WHEEL": _wheel(contents),
    }
    placed = [(_place(file, module, info), file) for file in contents.files
              if file.path not in INSTALLERS]  # fmt: skip
    record = []
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path, content in sorted(made.items()):
            _add(archive, path, 0o644, [content])
            record.append(_line(path, hashlib.sha256(content).digest(), len(content)))
        for path, file in sorted(placed, key=lambda pair: pair[0]):
            _add(archive, path, file.mode, _pieces(file))
            record.append(_line(path, bytes.fromhex(file.sha256()), file.bytes))
        record.append(f"{info}/RECORD,,")
        _add(archive, f"{info}/RECORD", 0o644, [("\n".join(record) + "\n").encode()])


def _module(contents: Contents) -> str:
    module = contents.name.replace("-", "_")
    return module if not module[0].isdigit() else f"model_{module}"


def _place(file: File, module: str, info: str) -> str:
    if file.path == "share/sbom.cdx.json":
        return f"{info}/sboms/sbom.cdx.json"  # PEP 770
    if file.path == "share/licenses.txt":
        return f"{info}/licenses/licenses.txt"
    return f"{module}/{file.path}"


def _metadata(contents: Contents) -> bytes:
    license = contents.license or ""
    # An SPDX expression; anything else says it in a field that is free.
    field = "License-Expression" if re.fullmatch(r"[A-Za-z0-9.+() -]+", license) else "License"
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {contents.name}",
        f"Version: {contents.version}",
        f"Summary: Compiled language model for {contents.target}",
        *([f"{field}: {license}"] if license else []),
        "License-File: licenses.txt",
        "Requires-Python: >=3.8",
        "Provides-Extra: text",
        'Requires-Dist: tokenizers; extra == "text"',
    ]
    return ("\n".join(lines) + "\n").encode()


def _wheel(contents: Contents) -> bytes:
    version = contents.bundle.manifest.made_by.get("slmtvm", "")
    return (
        f"Wheel-Version: 1.0\nGenerator: slmtvm {version}\nRoot-Is-Purelib: false\n"
        f"Tag: py3-none-{platform_tag(contents)}\n"
    ).encode()


def _pieces(file: File) -> list[bytes]:
    with file.source.open("rb") as source:
        return list(iter(lambda: source.read(_CHUNK), b""))


def _add(archive: zipfile.ZipFile, path: str, mode: int, pieces: Sequence[bytes]) -> None:
    entry = zipfile.ZipInfo(path, _TIME)
    entry.external_attr = (stat.S_IFREG | mode) << 16
    entry.create_system = 3  # Unix: the mode counts
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, b"".join(pieces))


def _line(path: str, digest: bytes, size: int) -> str:
    encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return f"{path},sha256={encoded},{size}"
