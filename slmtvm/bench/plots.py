"""Three plots as inline SVG: lines against context, a roofline, shares as bars.

Colours are CSS variables of the page (``--series-1`` ...), so that the plots follow its theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 16, 44
SERIES_COLOURS = 6
_BAR, _BAR_GAP = 20, 6
_LABEL_WIDTH = 380  # of a bar's name
_DASH = "6 4"


@dataclass(frozen=True)
class Line:
    """A named line; a ``limit`` is dashed and has no points. ``colour`` counts from 0."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    limit: bool = False


@dataclass(frozen=True)
class Dot:
    """A point of the roofline, with what to say when it is pointed at."""

    x: float
    y: float
    colour: int
    title: str


@dataclass(frozen=True)
class Bar:
    """A share of the whole, 0 to 1."""

    name: str
    share: float
    text: str


class _Scale:
    """Values to pixels, linearly or by their logarithm."""

    def __init__(self, low: float, high: float, first: float, last: float, log: bool) -> None:
        self._log = log
        self._low, self._high = self._value(low), self._value(high)
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        span = self._high - self._low or 1.0
        return self._first + (self._value(value) - self._low) / span * (self._last - self._first)

    def _value(self, value: float) -> float:
        return math.log10(value) if self._log else value


def line_plot(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Lines over a common x, y from 0 on."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = _linear_ticks(max(xs)), _linear_ticks(max(ys))
    x = _Scale(0, max(xs), _LEFT, WIDTH - _RIGHT, False)
    y = _Scale(0, y_ticks[-1], HEIGHT - _BOTTOM, _TOP, False)
    parts = [_axes(x, [t for t in x_ticks if t <= max(xs)], y, y_ticks, x_label, y_label)]
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        dash = f' stroke-dasharray="{_DASH}"' if line.limit else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{_colour(line.colour)}"'
            f' stroke-width="{1.5 if line.limit else 2}"{dash}/>'
        )
        if not line.limit:
            parts += [
                _circle(x(a), y(b), line.colour, f"{line.name}: {b:,.0f} at {a:,.0f}")
                for a, b in line.points
            ]
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}") + _legend(lines)


def roofline(
    dots: Sequence[Dot], roofs: Sequence[Line], keys: Sequence[Line], x_label: str, y_label: str
) -> str:
    """Dots under the roofs, both axes logarithmic; ``keys`` say what the dots' colours mean."""
    xs = [dot.x for dot in dots] + [x for roof in roofs for x, _ in roof.points]
    ys = [dot.y for dot in dots] + [y for roof in roofs for _, y in roof.points]
    x_ticks, y_ticks = _decades(min(xs), max(xs)), _decades(min(ys), max(ys))
    x = _Scale(x_ticks[0], x_ticks[-1], _LEFT, WIDTH - _RIGHT, True)
    y = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP, True)
    parts = [_axes(x, x_ticks, y, y_ticks, x_label, y_label)]
    for roof in roofs:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof.points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{_colour(roof.colour)}"'
            f' stroke-width="1.5" stroke-dasharray="{_DASH}"/>'
        )
    parts += [_circle(x(dot.x), y(dot.y), dot.colour, dot.title, radius=5) for dot in dots]
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}") + _legend([*keys, *roofs])


def bar_plot(bars: Sequence[Bar]) -> str:
    """Shares, one bar under the other, each with its name and text."""
    height = len(bars) * (_BAR + _BAR_GAP) + _BAR_GAP
    longest = max(bar.share for bar in bars)
    width = WIDTH - _LABEL_WIDTH - 110  # what is left is for the text behind the longest bar
    parts = []
    for i, bar in enumerate(bars):
        top = _BAR_GAP + i * (_BAR + _BAR_GAP)
        length = max(bar.share / longest * width, 1.0)
        middle = top + _BAR / 2 + 4
        parts.append(
            f"<g><title>{escape(bar.name)}: {escape(bar.text)}</title>"
            f'<text x="{_LABEL_WIDTH - 8}" y="{middle:.1f}" text-anchor="end">'
            f"{escape(_shortened(bar.name))}</text>"
            f'<rect x="{_LABEL_WIDTH}" y="{top}" width="{length:.1f}" height="{_BAR}"'
            f' fill="{_colour(0)}"/>'
            f'<text x="{_LABEL_WIDTH + length + 6:.1f}" y="{middle:.1f}">'
            f"{escape(bar.text)}</text></g>"
        )
    return _svg(parts, height, "share of time by kernel")


def _shortened(name: str, longest: int = 50) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def _axes(
    x: _Scale, x_ticks: Sequence[float], y: _Scale, y_ticks: Sequence[float], x_label: str,
    y_label: str,
) -> str:  # fmt: skip
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in y_ticks
    ]
    parts += [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text x="{x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{_number(t)}</text>'
        for t in x_ticks
    ]
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _circle(x: float, y: float, colour: int, title: str, radius: int = 4) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{_colour(colour)}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><line x1="1" x2="25" y1="5" y2="5"'
        f' stroke="{_colour(line.colour)}" stroke-width="2"'
        f"{f' stroke-dasharray={chr(34)}{_DASH}{chr(34)}' if line.limit else ''}/></svg>"
        f" {escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _colour(index: int) -> str:
    return f"var(--series-{index % SERIES_COLOURS + 1})"


def _linear_ticks(high: float) -> list[float]:
    """0 and round steps up to the first that is not below ``high``; four to eight of them."""
    step = 10.0 ** math.floor(math.log10(high / 4))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if high / (step * f) <= 8)
    return [i * step for i in range(math.ceil(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**e for e in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"
