"""What goes wrong in the importer itself: an error that says where, and what to send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slmtvm.errors import InternalError, InvalidModelError, SlmError

_MOST_WORDS = 300  # characters of a foreign message


class _FaultError(Exception):
    """Carries ``where`` an exception began; no SlmError, which some recognisers look past."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Remember where in the file an exception began that is no SlmError."""
    try:
        yield
    except (SlmError, MemoryError, OSError, _FaultError):
        raise
    except Exception as error:
        raise _FaultError(where()) from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn an exception that is no SlmError into one that names the file, and the node if known.

    The original is its cause. What is no fault of the importer stays as it is: memory that is not
    there, and an interruption.
    """
    try:
        yield
    except (SlmError, MemoryError):
        raise
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {words(error)}", where=str(path)) from error
    except Exception as error:
        where, cause = str(path), error
        if isinstance(error, _FaultError) and isinstance(error.__cause__, Exception):
            where, cause = error.where, error.__cause__
        raise InternalError(
            f"slmtvm itself failed here ({words(cause)}); please report it with what `slmtvm "
            f"inspect {path} --report FILE` writes, which is the graph without its weights",
            where=where,
        ) from cause


def words(error: Exception) -> str:
    """A foreign exception in one line, not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MOST_WORDS else f"{text[:_MOST_WORDS]}..."
