"""How fast a bundle is on this machine, and how fast the machine would let it be."""

from slmtvm.bench.measure import bench
from slmtvm.bench.page import html_page
from slmtvm.bench.report import BenchReport

__all__ = ["BenchReport", "bench", "html_page"]
