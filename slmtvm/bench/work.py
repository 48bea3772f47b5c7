"""From calls of kernels to bytes and multiply-adds, for the limits that a bench compares with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmtvm.bench.limits import Limits
from slmtvm.bench.report import KernelTime
from slmtvm.runtime import interface


@dataclass(frozen=True)
class Work:
    """Bytes of weights and KV cache read, bytes moved with the activations, multiply-adds."""

    bytes_read: float
    bytes_moved: float
    multiply_adds: float


def kernel_work(described: Mapping[str, Any], calls: int, attended: float) -> Work:
    """The work of ``calls`` of a kernel of ``slm_info()``.

    ``attended``: positions that a row attends to, on average over rows and calls.
    """
    attended = min(attended, described["window"] or attended)
    read = described["weight_bytes"] + described["context_bytes"] * attended
    multiply_adds = described["multiply_adds"] + described["context_multiply_adds"] * attended
    moved = read + described["activation_bytes"]
    return Work(calls * read, calls * moved, calls * multiply_adds)


def total_work(
    described: Sequence[Mapping[str, Any]], calls: Mapping[str, int], attended: float
) -> Work:
    """The work of all kernels together."""
    parts = [kernel_work(d, calls.get(d["name"], 0), attended) for d in described]
    return Work(
        sum(p.bytes_read for p in parts),
        sum(p.bytes_moved for p in parts),
        sum(p.multiply_adds for p in parts),
    )


def kernel_times(
    phase: str,
    described: Sequence[Mapping[str, Any]],
    profile: Mapping[str, interface.KernelTime],
    attended: float,
    limits: Limits,
) -> list[KernelTime]:
    """A row for each kernel that ran, the longest first."""
    total = sum(time.nanoseconds for time in profile.values())
    rows = []
    for kernel in described:
        time = profile[kernel["name"]]
        if not time.calls:
            continue
        work = kernel_work(kernel, time.calls, attended)
        limited = limits.seconds(work.bytes_read, work.multiply_adds)
        rows.append(
            KernelTime(
                phase=phase,
                threads=limits.threads,
                kernel=kernel["name"],
                calls=time.calls,
                seconds=time.nanoseconds * 1e-9,
                overhead_seconds=(time.nanoseconds - time.own_nanoseconds) * 1e-9,
                share=time.nanoseconds / total,
                bytes_read=work.bytes_read,
                bytes_moved=work.bytes_moved,
                multiply_adds=work.multiply_adds,
                limit_seconds=limited,
            )
        )
    return sorted(rows, key=lambda row: -row.seconds)
