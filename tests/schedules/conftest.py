"""Which of the kernel tests are left to the slow and to the exhaustive ones.

They are products of kernels, sizes, knobs and targets, of which neighbours show the same faults.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable

import pytest

_KEPT = 10  # of the slow cases of a test, one in so many is not exhaustive,
_FAST = 4  # and of those that run a product of kernels, one in so many is not slow
_PRODUCTS = {"target", "target_name", "variant", "kv_dtype", "accumulators", "prologue"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow, fast = defaultdict(list), defaultdict(list)
    for item in items:
        if item.path.parent.name == "schedules" and isinstance(item, pytest.Function):
            if item.get_closest_marker("slow"):
                slow[item.function].append(item)
            elif _PRODUCTS & set(item.fixturenames):
                fast[item.function].append(item)
    for cases in slow.values():
        _mark(_left_out(cases, _KEPT), pytest.mark.exhaustive)
    for cases in fast.values():
        _mark(_left_out(cases, _FAST), pytest.mark.slow)


def _left_out(cases: list[pytest.Function], share: int) -> Iterable[pytest.Function]:
    """All but one in ``share`` of a test's cases, chosen by their names, and at least one."""
    by_number = sorted(cases, key=lambda case: (_number(case) % share, _number(case)))
    return (case for case in by_number[1:] if _number(case) % share)


def _number(case: pytest.Function) -> int:
    return zlib.crc32(case.name.encode())


def _mark(cases: Iterable[pytest.Function], mark: pytest.MarkDecorator) -> None:
    for case in cases:
        case.add_marker(mark)
