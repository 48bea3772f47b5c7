"""A bench's report as one page that needs nothing else: tables, and plots as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from slmtvm.bench.plots import Bar, Dot, Line, bar_plot, line_plot, roofline
from slmtvm.bench.report import BenchReport, KernelTime, number, percent

_LARGEST_SHARES = 12  # kernels that the share plot shows

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3;
  --series-1: #1f6feb; --series-2: #c2410c; --series-3: #15803d; --series-4: #7c3aed;
  --series-5: #b45309; --series-6: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6e9ec; --soft: #9aa4ae;
  --line: #313941; --series-1: #6ea8fe; --series-2: #fb923c; --series-3: #4ade80;
  --series-4: #b197fc; --series-5: #fbbf24; --series-6: #22d3ee; } }
body { background: var(--page); color: var(--ink); margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, td.name, th.name { text-align: left; }
td.name { font-family: ui-monospace, monospace; font-size: 0.8rem; }
svg.plot { width: 100%; height: auto; }
svg.plot text { fill: var(--soft); font-size: 12px; font-family: system-ui, sans-serif; }
svg.plot .grid { stroke: var(--line); stroke-width: 1; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; padding: 0;
  color: var(--soft); font-size: 0.9rem; }
"""


def html_page(report: BenchReport) -> str:
    """The page, as HTML text."""
    sections = [_summary(report), _speed(report)]
    if any(k.bytes_read and k.multiply_adds for k in report.kernels):
        sections.append(_roofline_section(report))
    sections += [_shares(report), _profile(report)]
    title = escape(f"{report.bundle} on {report.target}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _summary(report: BenchReport) -> str:
    rows = [
        ["CPU", escape(report.cpu)],
        ["Loading", f"{report.load_ms:.1f} ms, {report.map_ms:.1f} ms without the checksum"],
        ["First output", f"{report.first_token_ms:.1f} ms after loading, for a prompt of "
         f"{report.first_token_prompt} tokens"],
        ["Resident memory", f"{report.resident_bytes / 1e6:.1f} MB with a full context, "
         f"weights {report.weights_bytes / 1e6:.1f} MB"],
    ]  # fmt: skip
    for limit in report.limits:
        rows.append(
            [f"Limits, {_threads(limit.threads)}",
             f"{limit.read_bytes_per_second / 1e9:.1f} GB/s read over and over from "
             f"{limit.working_set / 1e6:.1f} MB, "
             f"{limit.multiply_adds_per_second / 1e9:.0f} G multiply-adds/s in int8"]
        )  # fmt: skip
    return _table(["", ""], rows, head=False)


def _speed(report: BenchReport) -> str:
    rows = [
        [r.name, str(r.threads), f"{r.tokens_per_second:,.0f}", f"{r.p50_ms:.3f}",
         f"{r.p99_ms:.3f}", number(r.read_limit), number(r.compute_limit), percent(r.of_limit)]
        for r in report.rates
    ]  # fmt: skip
    columns = ["Phase", "Threads", "Tokens/s", "p50 ms", "p99 ms", "Read limit", "Compute limit",
               "Reached"]  # fmt: skip
    table = _table(columns, rows)
    phase = "decode" if report.kind == "decoder" else "encode"
    lines: list[Line] = []
    for colour, threads in enumerate(dict.fromkeys(r.threads for r in report.rates)):
        chosen = [r for r in report.rates if r.phase == phase and r.threads == threads]
        at = [(float(r.position if phase == "decode" else r.tokens), r) for r in chosen]
        measured = tuple((x, r.tokens_per_second) for x, r in at)
        limit = tuple((x, r.limit) for x, r in at if r.limit)
        lines.append(Line(_threads(threads), measured, colour))
        if limit:
            lines.append(Line(f"limit, {_threads(threads)}", limit, colour, limit=True))
    label = "tokens in the context" if phase == "decode" else "tokens in the text"
    plot = line_plot(lines, label, "tokens/s")
    return f"<h2>Tokens per second</h2>{plot}{table}"


def _roofline_section(report: BenchReport) -> str:
    dots: list[Dot] = []
    roofs: list[Line] = []
    work = [k for k in report.kernels if k.bytes_read and k.multiply_adds]
    intensities = [k.multiply_adds / k.bytes_read for k in work]
    phases = list(dict.fromkeys((k.phase, k.threads) for k in work))
    for k, intensity in zip(work, intensities, strict=True):
        speed = k.multiply_adds / k.seconds / 1e9
        title = f"{k.kernel}, {k.phase}, {_threads(k.threads)}: {speed:.1f} G/s"
        dots.append(Dot(intensity, speed, phases.index((k.phase, k.threads)), title))
    low, high = min(intensities), max(intensities)
    for limit in report.limits:
        read, peak = limit.read_bytes_per_second / 1e9, limit.multiply_adds_per_second / 1e9
        ridge = peak / read
        xs = sorted({low, min(max(ridge, low), high), high})
        points = tuple((x, min(x * read, peak)) for x in xs)
        colour = len(phases) + len(roofs)
        roofs.append(Line(f"roof, {_threads(limit.threads)}", points, colour, limit=True))
    keys = [
        Line(f"{phase}, {_threads(threads)}", (), colour)
        for colour, (phase, threads) in enumerate(phases)
    ]
    plot = roofline(dots, roofs, keys, "multiply-adds per byte read", "G multiply-adds/s")
    note = "Each dot is a kernel; bytes are those of weights and KV cache."
    return f'<h2>Roofline</h2>{plot}<p class="note">{note}</p>'


def _shares(report: BenchReport) -> str:
    parts = []
    for title, kernels in _by_phase(report):
        bars = [
            Bar(k.kernel, k.share, f"{k.share:.1%}, {k.seconds / k.calls * 1e6:.1f} us")
            for k in kernels[:_LARGEST_SHARES]
        ]
        parts.append(f"<h2>Share by kernel: {escape(title)}</h2>{bar_plot(bars)}")
    return "\n".join(parts)


def _profile(report: BenchReport) -> str:
    columns = ["Share", "Calls", "us/call", "Waiting", "GB/s", "GOP/s", "Reached", "Kernel"]
    parts = []
    for title, kernels in _by_phase(report):
        rows = []
        for k in kernels:
            rows.append(
                [f"{k.share:.1%}", str(k.calls), f"{k.seconds / k.calls * 1e6:.2f}",
                 f"{k.overhead_seconds / k.seconds:.0%}", f"{k.bytes_moved / k.seconds / 1e9:.1f}",
                 f"{2 * k.multiply_adds / k.seconds / 1e9:.1f}",
                 percent(k.of_limit), escape(k.kernel)]
            )  # fmt: skip
        parts.append(f"<h2>Kernels: {escape(title)}</h2>" + _table(columns, rows, named_last=True))
    return "\n".join(parts)


def _by_phase(report: BenchReport) -> list[tuple[str, list[KernelTime]]]:
    phases = dict.fromkeys((k.phase, k.threads) for k in report.kernels)
    return [
        (
            f"{phase}, {_threads(threads)}",
            [k for k in report.kernels if (k.phase, k.threads) == (phase, threads)],
        )
        for phase, threads in phases
    ]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, head: bool = True,
    named_last: bool = False,
) -> str:  # fmt: skip
    def cells(tag: str, row: Sequence[str]) -> str:
        last = ' class="name"' if named_last else ""
        return "".join(
            f"<{tag}{last if i == len(row) - 1 else ''}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    top = f"<thead><tr>{cells('th', columns)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'
