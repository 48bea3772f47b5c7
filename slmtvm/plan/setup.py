"""How a plan is divided: into chunks of a prompt, and over threads. Results do not depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CHUNKS = (1, 16, 128)
PARALLEL_BYTES = 32 * 1024
_LEAST_LARGEST_CHUNK, _MOST_ROWS, _MOST_BYTES = 16, 1024, 1 << 30
_MOST_THREADS = 64  # SLM_MAX_THREADS


@dataclass(frozen=True)
class Setup:
    """What is the same for all kernels of a plan.

    ``chunks``: numbers of rows that a decoder's body is compiled for, from 1 on; those beyond the
    context are left out. ``parallel_bytes``: a step with fewer bytes of operands is computed by one
    thread. ``threads``: as many as pay, where a caller asks for as many as pay; 0: not known, one
    for each core.
    """

    chunks: tuple[int, ...] = CHUNKS
    parallel_bytes: int = PARALLEL_BYTES
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where nothing could be compiled so."""
        chunks = self.chunks
        if chunks != tuple(sorted(set(chunks))) or chunks[:1] != (1,):
            raise ValueError(f"chunks {chunks} are not 1 and larger numbers in order")
        if not _LEAST_LARGEST_CHUNK <= chunks[-1] <= _MOST_ROWS:
            raise ValueError(f"the largest chunk is {chunks[-1]} rows, must be 16 to 1024")
        if not 0 <= self.parallel_bytes <= _MOST_BYTES:
            raise ValueError(f"parallel_bytes is {self.parallel_bytes}, must be 0 to 2**30")
        if not 0 <= self.threads <= _MOST_THREADS:
            raise ValueError(f"threads is {self.threads}, must be 0 to {_MOST_THREADS}")

    def __str__(self) -> str:
        chunks = ", ".join(map(str, self.chunks))
        return (
            f"chunks of {chunks} rows, one thread below {self.parallel_bytes:,} bytes, "
            f"{self.threads or 'all'} threads"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> Setup:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        chunks = tuple(int(rows) for rows in table["chunks"])
        return Setup(chunks, int(table["parallel_bytes"]), int(table["threads"]))


DEFAULT_SETUP = Setup()
