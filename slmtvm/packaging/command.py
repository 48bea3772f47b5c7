"""Programs of others that some formats are made with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from slmtvm.errors import SlmError

# 2020-01-01, in seconds: the time of files in packages that have one, where 1970 is taken for none.
PACKAGE_TIME = 1577836800
_SECONDS = 600


def run(program: str, package: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Run ``program`` of the Debian ``package``; what it wrote to its standard output.

    Raises SlmError where it is not there, or fails, with the last line that it said.
    """
    # Those that only root needs otherwise lie where other users do not look.
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    found = shutil.which(program, path=path)
    if found is None:
        raise SlmError(
            f"is not here, which makes this format; on Debian and Ubuntu: apt install {package}",
            where=program,
        )
    fixed = {"SOURCE_DATE_EPOCH": f"{PACKAGE_TIME}", "E2FSPROGS_FAKE_TIME": f"{PACKAGE_TIME}"}
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC", **fixed}
    try:
        done = subprocess.run(
            [found, *map(str, arguments)], cwd=folder, env=environment, capture_output=True,
            text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise SlmError(f"did not end in {_SECONDS} seconds", where=program) from error
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "?").splitlines()
        raise SlmError(f"failed with exit code {done.returncode}: {words[-1]}", where=program)
    return done.stdout
