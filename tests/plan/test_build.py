"""The plan of a small decoder: how large its KV cache is."""

from __future__ import annotations

import pytest

from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan, Space
from slmtvm.target import Target
from tests.passes.toy import CONTEXT, HEAD_DIM, KV_HEADS, decoder

LAYERS = 2
VALUES = 2 * KV_HEADS * HEAD_DIM * LAYERS  # of a position: its keys and values


def plan(target: str, kv_dtype: str | None) -> Plan:
    return build_plan(lower(fuse(decoder(layers=LAYERS)), Target.load(target), kv_dtype), {})


@pytest.mark.parametrize(
    ("target", "kv_dtype", "itemsize"),
    [
        ("x86-64-v3", "float32", 4),
        ("x86-64-v3", "float16", 2),
        ("riscv64-rvv", "float16", 2),
        ("x86-64-v4-vnni", None, 2),
        ("cortex-a72", None, 2),
        ("riscv64-rvv", None, 4),
        # A head's features have a scale of 4 bytes besides.
        ("cortex-a78", "int8", 1 + 4 / HEAD_DIM),
    ],
)
def test_the_state_is_as_large_as_the_cache_in_its_dtype(
    target: str, kv_dtype: str | None, itemsize: float
) -> None:
    made = plan(target, kv_dtype)
    assert made.kv_bytes_per_token == VALUES * itemsize
    assert made.capacity >= CONTEXT
    assert made.state_bytes == made.capacity * VALUES * itemsize
    caches = {
        ref
        for function in made.functions
        for step in function.steps
        for ref in step.args
        if ref.space == Space.STATE
    }
    assert sum(ref.size for ref in caches) == made.state_bytes
    assert max(ref.offset + ref.size for ref in caches) == made.state_bytes
