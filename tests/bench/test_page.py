"""The page of a report: whole, and of nothing but itself."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

from slmtvm.bench import BenchReport, bench, html_page
from slmtvm.bench.plots import Bar, Dot, Line, bar_plot, line_plot, roofline


def plots(page: str) -> list[ElementTree.Element]:
    """Every plot, parsed."""
    found = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in found]


def test_a_page_has_the_three_kinds_of_plot(report: BenchReport) -> None:
    labels = [svg.get("aria-label") for svg in plots(html_page(report))]
    assert labels[:2] == [
        "tokens/s against tokens in the context",
        "G multiply-adds/s against multiply-adds per byte read",
    ]
    assert labels[2:] == ["share of time by kernel"] * 4


def test_a_page_refers_to_nothing_outside(report: BenchReport) -> None:
    page = html_page(report)
    assert "http" not in page
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", page)


def test_a_page_names_every_kernel_and_every_phase(report: BenchReport) -> None:
    page = html_page(report)
    assert all(f">{k.kernel}<" in page for k in report.kernels)
    assert all(f">{r.name}<" in page for r in report.rates)


def test_names_cannot_break_the_page(report: BenchReport) -> None:
    page = html_page(dataclasses.replace(report, bundle="<b>&.slm", cpu='"><script>'))
    assert "&lt;b&gt;&amp;.slm" in page
    assert "<script" not in page


def test_a_page_without_known_work_has_no_roofline(encoder: Path) -> None:
    page = html_page(bench(encoder, threads=[1]))
    labels = [svg.get("aria-label") for svg in plots(page)]
    assert labels == ["tokens/s against tokens in the text", "share of time by kernel"]


@pytest.mark.parametrize("high", [0.02, 1, 37, 4999, 123456])
def test_lines_stay_inside_their_plot(high: float) -> None:
    points = ((0.0, high), (10.0, high / 3), (700.0, high / 50))
    (svg,) = plots(line_plot([Line("a", points, 0)], "x", "y"))
    (line,) = svg.iter("polyline")
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for pair in line.attrib["points"].split():
        x, y = map(float, pair.split(","))
        assert 0 < x < width and 0 < y < height


def test_a_roofline_places_dots_by_their_logarithm() -> None:
    dots = [Dot(10.0**i, 10.0**i, 0, f"dot {i}") for i in range(4)]
    roof = Line("roof", ((1.0, 1.0), (1000.0, 1000.0)), 1, limit=True)
    (svg,) = plots(roofline(dots, [roof], [], "x", "y"))
    xs = [float(circle.attrib["cx"]) for circle in svg.iter("circle")]
    steps = [b - a for a, b in pairwise(xs)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)


def test_bars_are_as_long_as_their_share() -> None:
    bars = [Bar("a", 0.6, "60 %"), Bar("b" * 80, 0.3, "30 %")]
    (svg,) = plots(bar_plot(bars))
    lengths = [float(rect.attrib["width"]) for rect in svg.iter("rect")]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01)
