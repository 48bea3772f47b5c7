"""Memory planning: buffers alive together never overlap, and memory is reused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slmtvm.plan.arena import ALIGNMENT, Lifetime, place

LIFETIMES = st.lists(
    st.builds(
        lambda size, first, length: Lifetime(size, first, first + length),
        st.integers(1, 5000),
        st.integers(0, 20),
        st.integers(0, 10),
    ),
    max_size=30,
)


@given(LIFETIMES, st.sampled_from([0, 64, 640]))
def test_buffers_that_are_alive_together_never_overlap(
    lifetimes: list[Lifetime], base: int
) -> None:
    offsets, end = place(lifetimes, base)
    for i, a in enumerate(lifetimes):
        assert offsets[i] % ALIGNMENT == 0
        assert base <= offsets[i]
        assert offsets[i] + a.size <= end
        for j, b in enumerate(lifetimes[:i]):
            together = a.first <= b.last and b.first <= a.last
            apart = offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
            assert apart or not together


def test_a_chain_of_equal_buffers_needs_two() -> None:
    chain = [Lifetime(1024, i, i + 1) for i in range(10)]
    assert place(chain)[1] == 2 * 1024
