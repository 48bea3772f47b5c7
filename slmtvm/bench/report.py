"""What a bench found: plain numbers, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slmtvm.bench.busy import Busy
from slmtvm.bench.limits import Limits


@dataclass(frozen=True)
class Rate:
    """Tokens a second of one phase, beside what the machine allows.

    ``tokens`` are evaluated in one call ("prefill", "encode"), or one by one from ``position`` on
    ("decode"). ``read_limit`` is the measured bandwidth over the bytes of weights and KV cache that
    a token takes; ``compute_limit`` the measured dot product peak over its multiply-adds.
    """

    phase: str
    threads: int
    position: int
    tokens: int
    tokens_per_second: float
    p50_ms: float  # of a token where they come one by one, else of the call
    p99_ms: float
    read_limit: float | None  # tokens/s; None where nothing is known to be read
    compute_limit: float | None  # tokens/s; None where nothing is known to be multiplied

    @property
    def name(self) -> str:
        """What was done, as tables have it."""
        if self.phase == "decode":
            return f"decode at {self.position}"
        return f"{self.phase} {self.tokens}"

    @property
    def limit(self) -> float | None:
        """The nearer limit, tokens/s."""
        return min((x for x in (self.read_limit, self.compute_limit) if x), default=None)

    @property
    def of_limit(self) -> float | None:
        """The fraction of the nearer limit that is reached."""
        return self.tokens_per_second / self.limit if self.limit else None


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one phase, on one thread count; times and work of all its calls together."""

    phase: str
    threads: int
    kernel: str
    calls: int
    seconds: float
    overhead_seconds: float  # handing over to other threads and waiting for them
    share: float  # of the phase's time in kernels
    bytes_read: float  # weights and KV cache
    bytes_moved: float  # these, and activations read and written
    multiply_adds: float
    limit_seconds: float  # what reading and multiplying would take at the machine's limits

    @property
    def of_limit(self) -> float | None:
        """The fraction of the limit that is reached; None where there is nothing to read."""
        return self.limit_seconds / self.seconds if self.limit_seconds else None


@dataclass(frozen=True)
class BenchReport:
    """Everything that ``bench`` measured of one bundle."""

    bundle: str
    target: str
    cpu: str
    cores: str  # that it may run on
    why: str  # what bounds the number of threads
    busy_before: Busy
    busy_during: Busy  # with what is not this process
    kind: str
    context: int
    weights_bytes: int
    load_ms: float  # with the checksum of all weights
    map_ms: float  # without
    first_token_ms: float  # of a prompt of ``first_token_prompt`` tokens, after loading, 1 thread
    first_token_prompt: int
    resident_bytes: int  # weights, session and library, after a full context
    limits: tuple[Limits, ...]
    rates: tuple[Rate, ...]
    kernels: tuple[KernelTime, ...]
    choice: str = ""  # why this library, where one of a GPU and one of a CPU were measured

    def to_json(self) -> dict[str, Any]:
        """The object that ``slmtvm bench --json`` writes."""
        plain: dict[str, Any] = asdict(self)
        for entry, rate in zip(plain["rates"], self.rates, strict=True):
            entry["of_limit"] = rate.of_limit
        for entry, kernel in zip(plain["kernels"], self.kernels, strict=True):
            entry["of_limit"] = kernel.of_limit
        return plain

    def __str__(self) -> str:
        parts = [self._summary(), _limits(self.limits), _rates(self.rates)]
        for phase, threads in dict.fromkeys((k.phase, k.threads) for k in self.kernels):
            rows = [k for k in self.kernels if (k.phase, k.threads) == (phase, threads)]
            parts.append(f"{phase}, {threads} thread{'s' * (threads > 1)}\n" + _kernels(rows))
        return "\n\n".join(parts)

    def _busy(self) -> str:
        text = f"before: {self.busy_before}; while measuring: {self.busy_during}"
        if self.busy_during.matters:
            text += ": all rates are lower than this machine allows"
        return text

    def _summary(self) -> str:
        return _table(
            [
                ["cpu", self.cpu],
                ["cores", f"{self.cores} ({self.why})"],
                ["busy", self._busy()],
                ["target", self.target],
                *([["choice", self.choice]] if self.choice else []),
                ["load", f"{self.load_ms:.1f} ms; without checksum {self.map_ms:.1f} ms"],
                ["first output", f"{self.first_token_ms:.1f} ms after loading, "
                 f"{self.first_token_prompt} tokens in"],
                ["resident", f"{self.resident_bytes / 1e6:.1f} MB, "
                 f"weights {self.weights_bytes / 1e6:.1f} MB"],
            ]
        )  # fmt: skip


def number(value: float | None) -> str:
    """A whole number as tables have it; nothing for None."""
    return "" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction as tables have it; nothing for None."""
    return "" if value is None else f"{value:.0%}"


def _limits(limits: Sequence[Limits]) -> str:
    rows = [["limits of this machine", "read", "multiply-adds"]]
    for limit in limits:
        label = f"{limit.threads} threads, {limit.working_set / 1e6:.1f} MB over and over"
        rows.append(
            [
                label,
                f"{limit.read_bytes_per_second / 1e9:.1f} GB/s",
                f"{limit.multiply_adds_per_second / 1e9:.0f} G/s",
            ]
        )
    return _table(rows)


def _rates(rates: Sequence[Rate]) -> str:
    rows = [["phase", "threads", "tokens/s", "p50 ms", "p99 ms", "read limit", "compute limit",
             "reached"]]  # fmt: skip
    for rate in rates:
        rows.append(
            [rate.name, str(rate.threads), f"{rate.tokens_per_second:,.0f}", f"{rate.p50_ms:.3f}",
             f"{rate.p99_ms:.3f}", number(rate.read_limit), number(rate.compute_limit),
             percent(rate.of_limit)]
        )  # fmt: skip
    return _table(rows)


def _kernels(kernels: Sequence[KernelTime]) -> str:
    rows = [["share", "calls", "us/call", "waiting", "GB/s", "GOP/s", "reached", "kernel"]]
    for k in kernels:
        rows.append(
            [f"{k.share:.1%}", str(k.calls), f"{k.seconds / k.calls * 1e6:.2f}",
             f"{k.overhead_seconds / k.seconds:.0%}", f"{k.bytes_moved / k.seconds / 1e9:.1f}",
             f"{2 * k.multiply_adds / k.seconds / 1e9:.1f}",
             percent(k.of_limit), k.kernel]
        )  # fmt: skip
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
