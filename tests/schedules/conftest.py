"""Which of the slow kernel tests are left to the exhaustive ones.

They are products of kernels, sizes, knobs and targets, of which neighbours show the same faults.
"""

from __future__ import annotations

import zlib

import pytest

_KEPT = 6  # one of so many, chosen by its name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        chosen = zlib.crc32(item.name.encode()) % _KEPT == 0
        if item.path.parent.name == "schedules" and item.get_closest_marker("slow") and not chosen:
            item.add_marker(pytest.mark.exhaustive)
