"""What a board needs to measure, in one archive: the runner, its start, a check of the CPU."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

from slmtvm.rpc import slm_runner
from slmtvm.rpc.keygen import role_folder
from slmtvm.rpc.program import build_program
from slmtvm.target import Target

_START = """#!/bin/sh
# Measure for a tuner:  ./run --tracker HOST:PORT --key {name}
here=$(cd "$(dirname "$0")" && pwd)
missing=$("$here/check" requires) || exit 1
if [ -n "$missing" ]; then
  echo "this CPU lacks $missing, which the target {name} requires" >&2
  exit 1
fi
exec python3 "$here/slm_runner.py" {options}"$@"
"""


def pack_runner(target: Target, path: Path, *, keys: Path | None = None) -> str:
    """Write the archive (.tar.gz) for a board of ``target`` to ``path``; what it holds, in words.

    keys: of a runner, or what ``keygen`` wrote; they go into the archive, which then is a secret.
    The same arguments give the same bytes. Raises SlmError, OSError where that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        check = Path(folder) / "check"
        build_program({}, target, check)
        options = '--tls "$here/keys" ' if keys else ""
        files = [
            ("slm_runner.py", Path(slm_runner.__file__).read_bytes(), 0o755),
            ("check", check.read_bytes(), 0o755),
            ("run", _START.format(name=target.name, options=options).encode(), 0o755),
        ]
    if keys:
        own = role_folder(keys, "runner")
        for name in ("ca.pem", "cert.pem", "key.pem"):
            files.append((f"keys/{name}", (own / name).read_bytes(), 0o600))
    content = _archive(files)
    mode = 0o600 if keys else 0o644
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, mode)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return f"{path}: {len(content) / 1024:.0f} kB; on the board: ./run --tracker HOST:PORT"


def _archive(files: list[tuple[str, bytes, int]]) -> bytes:
    import gzip

    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, content, mode in files:
            member = tarfile.TarInfo(f"slm-runner/{name}")
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
