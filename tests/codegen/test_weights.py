"""Several plans' weights in one file: stored once, found by every plan, checked to the last bit."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slmtvm.codegen.weights import ALIGNMENT, HEADER_BYTES, MAGIC, merge_weights
from slmtvm.plan.model import Plan, Ref, Segment, Space
from tests.runtime.toy import toy_decoder, toy_encoder, toy_weights


def content(file: bytes, ref: Ref) -> bytes:
    return file[ref.offset : ref.offset + ref.size]


def weight_refs(plan: Plan) -> list[Ref]:
    return [
        ref
        for function in plan.functions
        for step in function.steps
        for ref in step.args
        if ref.space == Space.WEIGHTS
    ]


def test_every_plan_finds_its_bytes_in_the_merged_file(tmp_path: Path) -> None:
    plans = [toy_decoder(), toy_encoder(toy_weights(seed=7)), toy_encoder()]
    weights, merged = merge_weights(plans)
    weights.write(tmp_path / "weights.bin")
    file = (tmp_path / "weights.bin").read_bytes()
    assert len(file) == weights.size
    for before, after in zip(plans, merged, strict=True):
        for old, new in zip(weight_refs(before), weight_refs(after), strict=True):
            wanted = next(s.data for s in before.segments if s.offset == old.offset)
            assert new.offset % ALIGNMENT == 0
            assert content(file, new) == wanted.tobytes()


def test_equal_weights_are_stored_once() -> None:
    alone, _ = merge_weights([toy_decoder()])
    together, _ = merge_weights([toy_decoder(), toy_decoder(), toy_encoder()])
    assert together.size == alone.size
    assert together.content_id == alone.content_id


def test_the_header_says_what_the_file_holds(tmp_path: Path) -> None:
    weights, _ = merge_weights([toy_decoder()])
    weights.write(tmp_path / "w")
    header = (tmp_path / "w").read_bytes()[:HEADER_BYTES]
    magic, version, count, size, content_id = struct.unpack("<8sIIQQ", header[:32])
    assert (magic, version, count, size, content_id) == (
        MAGIC, 1, 3, weights.size, weights.content_id,
    )  # fmt: skip
    assert header[32:] == bytes(32)


def test_a_part_of_a_segment_keeps_its_place_in_it() -> None:
    plan = toy_encoder()
    table = plan.segments[0]
    step = replace(plan.functions[0].steps[0], args=(Ref(Space.WEIGHTS, table.offset + 64, 128),))
    plan = replace(plan, functions=(replace(plan.functions[0], steps=(step,)),))
    _, (_, merged) = merge_weights([toy_decoder(toy_weights(seed=3)), plan])
    (ref,) = weight_refs(merged)
    assert ref.offset == merged.segments[0].offset + 64


def test_an_argument_across_two_segments_is_refused() -> None:
    plan = toy_encoder()
    step = replace(plan.functions[0].steps[0], args=(Ref(Space.WEIGHTS, 0, 10**6),))
    with pytest.raises(ValueError, match="one weight segment"):
        merge_weights([replace(plan, functions=(replace(plan.functions[0], steps=(step,)),))])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 8 << 20, (8 << 20) + 1])
def test_any_changed_byte_changes_the_content_id(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)

    def content_id(data: np.ndarray) -> int:
        segments = (Segment("first", 0, np.arange(3.0)), Segment("second", 64, data))
        plan = replace(toy_encoder(), functions=(), segments=segments)
        return merge_weights([plan])[0].content_id

    original = content_id(data)
    for position in (0, size // 2, size - 1):
        changed = data.copy()
        changed[position] ^= 0x10
        assert content_id(changed) != original
