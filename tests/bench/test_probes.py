"""The kernels that measure the machine do all the work that they are counted for."""

from __future__ import annotations

import numpy as np
import pytest

from slmtvm.bench import probes
from slmtvm.bench.limits import LimitProbe
from slmtvm.schedules import isa
from slmtvm.target import Target, known_targets
from tests.schedules.harness import run

PIECES = 3
WORDS = probes.PIECE_BYTES // 4
BLOCKS = 2
# A one in each operand that a byte holds.
ONES = {"uint8": 0x11, "int8": 1}


@pytest.mark.parametrize("ahead", probes.READ_AHEAD)
def test_the_reading_kernel_reads_every_word(ahead: int) -> None:
    data = np.random.default_rng(0).integers(-1000, 1000, (PIECES, WORDS), dtype=np.int32)
    kernel = probes.read_kernel(ahead, PIECES)
    out = run(kernel, {"data": data}, Target.load("host"))["out"]
    assert np.array_equal(out, data.reshape(PIECES, -1, 16).sum(axis=1))


@pytest.mark.parametrize("name", known_targets())
@pytest.mark.parametrize("index", range(3))
def test_a_dot_product_kernel_adds_as_often_as_it_is_counted_for(name: str, index: int) -> None:
    target = Target.load(name)
    primitives = isa.get(target.isa)
    probe = probes.dot_kernels(primitives, BLOCKS)[index]
    offset = (0, primitives.s8_s8().offset, primitives.s8_row().offset)[index]
    weights, activations, _ = probe.kernel.tensors
    if index == 0:
        offset = primitives.fields_s8(4, 2).offset
    inputs = {
        "weights": np.full(weights.shape, ONES[weights.dtype], weights.dtype),
        "activations": np.ones(activations.shape, activations.dtype),
    }
    out = run(probe.kernel, inputs, target)["out"]
    assert np.all(out == probe.block_multiply_adds // primitives.lanes * (1 + offset))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_limits_are_measured_for_any_number_of_threads(threads: int) -> None:
    limits = LimitProbe(Target.load("host"), working_set=100_000).measure(threads)
    assert limits.threads == threads
    assert 100_000 <= limits.working_set < 100_000 + probes.PIECE_BYTES
    assert limits.read_bytes_per_second > 0 and limits.multiply_adds_per_second > 0


def test_the_slower_of_reading_and_multiplying_sets_the_time() -> None:
    limits = LimitProbe(Target.load("host"), working_set=100_000).measure(1)
    reading = limits.seconds(limits.read_bytes_per_second, 0)
    multiplying = limits.seconds(0, 2 * limits.multiply_adds_per_second)
    assert (reading, multiplying) == (1, 2)
