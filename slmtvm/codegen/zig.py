"""The C compiler and linker for every target: ziglang, which comes as a Python package."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import ziglang

from slmtvm.errors import SlmError

# Called itself: to start Python for it takes as long as to link a small library.
_ZIG = Path(ziglang.__file__).parent / "zig"
_PROBE_BYTES = 32 << 20  # the stubs of a libc take less


class ZigError(Exception):
    """All that zig printed: the cause of the one line that a user sees."""


def cache_folder() -> Path:
    """Where zig keeps the libc stubs that it builds once for each target.

    Raises SlmError where this user has no folder for caches.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # neither HOME nor an entry in the password file
        raise SlmError(
            "there is no home folder to keep the stubs of C libraries in; set XDG_CACHE_HOME"
        ) from error
    return cache.absolute() / "slmtvm" / "zig"


def library_folder(cache: Path) -> Path:
    """zig's own headers and sources, by a path in ``cache`` that all environments share.

    That path is part of the keys of zig's cache: by the environment's own, each new environment
    would build the stubs again, for minutes. Where ``cache`` cannot be written and names no
    environment that is there, the path is this environment's own.
    """
    own = _ZIG.parent / "lib"
    release = version("ziglang")
    link = cache / f"lib-{release}"
    with contextlib.suppress(OSError):
        if not _is_of(release, link):
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / link.name
                made.symlink_to(own)
                made.replace(link)
    return link if _is_of(release, link) else own


def _is_of(release: str, link: Path) -> bool:
    """Whether ``link`` leads to an environment that has this release of ziglang still."""
    try:
        library = Path(os.readlink(link))
    except OSError:
        return False
    return library.is_dir() and (library.parents[1] / f"ziglang-{release}.dist-info").is_dir()


def caches() -> dict[str, str]:
    """The environment by which zig keeps what it builds, and finds it again whatever environment of
    Python it is in."""
    cache = cache_folder()
    return {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LIB_DIR": str(library_folder(cache))}


def zig_cc(
    link_triple: str,
    arguments: Sequence[str],
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Run ``zig cc -target link_triple arguments``; SlmError with zig's words if it fails, OSError
    where ``folder`` is full.

    It runs in ``folder``, which may be anything but removed meanwhile, by default the current one,
    and what it makes on the way lies there and is removed: only the libc stubs are kept in
    ``cache_folder()``. A path is part of the keys of its cache, so that the objects of folders with
    random names would gather there for ever. ``progress`` is told when this is the first time for
    ``link_triple``, which takes much longer.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_keep(cache, error) from error
    done_before = cache / f"linked-{link_triple}"
    if progress and not done_before.exists():
        progress(f"building the libc stubs for {link_triple}: once, up to 3 minutes")
    # -fno-sanitize: zig turns the undefined-behaviour sanitizer on by default, which would put its
    # runtime into the library.
    command = [str(_ZIG), "cc", "-target", link_triple, "-fno-sanitize=all", *arguments]
    with tempfile.TemporaryDirectory(prefix="zig-", dir=folder) as scratch:
        environment = {
            **os.environ, **caches(), "ZIG_LOCAL_CACHE_DIR": os.path.abspath(scratch),
        }  # fmt: skip
        code, words = _run(command, environment, folder)
        if code != 0:
            _check_room(cache, Path(scratch))
            raise SlmError(f"zig cc failed for {link_triple}: {_first_error(words)}") from ZigError(
                words
            )
    with contextlib.suppress(OSError):  # a cache that holds all that is needed may be read-only
        done_before.touch()


def _run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path | None
) -> tuple[int, str]:
    """The exit code of ``command`` and what it wrote as errors.

    It has a process group of its own, which ends with it where this process is interrupted: zig
    starts compilers that would go on writing into folders that are being removed.
    """
    try:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise SlmError(f"cannot be started: {error.strerror}", where=command[0]) from error
    try:
        _, words = process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, words.decode(errors="replace").strip()


def _first_error(words: str) -> str:
    """The first error of many lines, and how many there are."""
    lines = words.splitlines()
    errors = [line for line in lines if "error:" in line] or lines or ["it says nothing"]
    more = f" (and {len(lines) - 1} lines more: --debug)" if len(lines) > 1 else ""
    return errors[0].strip() + more


def _check_room(cache: Path, scratch: Path) -> None:
    """Raise SlmError where the cache has no room, OSError where what is written has none.

    zig's own words for it are hundreds of lines about what it could not build.
    """
    for folder in (cache, scratch):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)
        except OSError as error:
            if folder == cache:
                raise _cannot_keep(cache, error) from error
            raise OSError(error.errno, error.strerror, str(folder.parent)) from error


def _cannot_keep(cache: Path, error: OSError) -> SlmError:
    return SlmError(
        f"the stubs of C libraries cannot be kept here: {error.strerror}; free some room, or set "
        "XDG_CACHE_HOME to a folder that can be written",
        where=str(cache),
    )
