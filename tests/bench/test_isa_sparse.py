"""Kernels that skip zeros, counted under qemu where its plugins are installed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from isa.sparse import PATTERNS, SparseCount, count_sparse, show_sparse


def test_what_misses_its_goal_is_marked() -> None:
    met = SparseCount("1:4", "cortex-a78", "", 1, 100, 60, 0.65)
    missed = SparseCount("1:4", "cortex-a78", "", 64, 100, 70, 0.65)
    _, first, second = show_sparse([met, missed]).splitlines()
    assert first.endswith("0.60") and second.endswith("0.70  above 0.65")


def test_patterns_have_the_zeros_that_they_say() -> None:
    for pattern in PATTERNS:
        weight = pattern.weight(64, 64)
        zeros = 1 - pattern.kept[0] / pattern.kept[1] if pattern.kept else pattern.share
        assert abs((weight == 0).mean() - zeros) < 0.15


@pytest.mark.slow
def test_fewer_blocks_execute_fewer_instructions() -> None:
    if not (shutil.which("qemu-aarch64") and shutil.which("cc")):
        pytest.skip("no qemu with plugins here; on Debian and Ubuntu: apt install qemu-user gcc")
    (known,) = (p for p in PATTERNS if p.name == "8x4, 70%")
    some, most = (
        count_sparse(replace(known, share=share), {"": "max"}) for share in (known.share, 0.9)
    )
    assert [c.dense for c in some] == [c.dense for c in most]
    assert all(a.sparse > 2 * b.sparse for a, b in zip(some, most, strict=True))
    assert some[-1].rows > 1 and some[-1].ratio <= known.goal
