"""A Ray cluster: other machines that compile, with the same slmtvm, Ray and Python installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slmtvm.errors import SlmError


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected with the cluster at ``address``: "ray://HOST:PORT" or what else
    ``ray.init`` takes. Raises SlmError where it is not installed, or the cluster cannot be used."""
    try:
        import ray
    except ImportError as error:
        raise SlmError(
            "a cluster needs ray, which is not installed: pip install 'slmtvm[cluster]'"
        ) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # of many classes, by transport
        raise SlmError(
            f"cannot be used: {first_line(error)}; does it run?", where=f"cluster {address}"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def first_line(error: Exception) -> str:
    """Of the errors of Ray, which hold tracebacks of other processes."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
