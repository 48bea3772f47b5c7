"""Every setting of a batch is measured or has a reason, whatever the others do."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from slmtvm.errors import DeviceError
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.experts import RoutedShape
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel, define
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.inputs import fills_of
from slmtvm.tuning.local import LocalRunner
from slmtvm.tuning.measuring import Batch, ProgramMeasurer
from slmtvm.tuning.program import Situation
from slmtvm.tuning.tasks import TaskKey
from slmtvm.tuning.tune import local_measurer
from tests.machines import EVERY_TARGET
from tests.schedules.harness import emulators
from tests.tuning.tasks import HOST, KEY, ROWS, SHAPE

QUICK = {"rounds": 2, "milliseconds": 0.1, "limit": 60.0}
ATTENTION = AttentionShape(
    m=7, num_heads=6, num_kv_heads=2, head_dim=24, capacity=64, scale=0.3, rotary_dim=24,
    table_rows=64,
)  # fmt: skip
KINDS = [
    KEY,
    TaskKey("linear", ROWS),
    TaskKey("linear", replace(ROWS, has_zero_points=True)),
    TaskKey("linear", LinearShape(3, 40, 96, "int8", "row_u8", has_zero_points=True)),
    TaskKey("linear", LinearShape(3, 40, 96, "int8", "block", 32)),
    TaskKey("linear", LinearShape(2, 40, 48, "bf16")),
    TaskKey("linear", LinearShape(2, 40, 64, "int4", group_size=32, scale_dtype="float16")),
    TaskKey("linear", LinearShape(2, 64, 48, "e4m3fn", group_channels=16)),
    TaskKey("routed_linear", RoutedShape(1, 2, 4, replace(SHAPE, n=40), by_pair=False)),
    TaskKey("routed_linear", RoutedShape(6, 2, 4, replace(SHAPE, n=40), by_pair=True)),
    TaskKey("linear", LinearShape(3, 40, 96, "int8", "row_u8", sparse=True)),
    TaskKey("attend", ATTENTION),
    TaskKey("attend", replace(ATTENTION, mask="bidirectional", bias_columns=96, bias_zero=40)),
    TaskKey("decode", replace(ATTENTION, m=1, kv_dtype="float16", window=40)),
    TaskKey("decode", replace(ATTENTION, m=1, kv_dtype="int8", roundings=((0.1, 0.1, -128, 127),))),
]


def batch(of: TaskKey, settings: list[Knobs], **fields: Any) -> Batch:
    situation = Situation(position=50, valid=of.shape.m)
    return Batch(of, settings, situation, **{**QUICK, **fields})


def other_settings(of: TaskKey, isa: Isa) -> list[Knobs]:
    return random.Random(0).sample(TEMPLATES[of.kind].settings(of.shape, isa)[1:], 2)


def test_columns_are_measured_on_lists_that_fit_their_masks() -> None:
    shape = LinearShape(3, 40, 112, "int8", "row_u8", sparse=True, window="columns")
    kernel = linear.build(shape, isas.get("rvv"))
    fills = dict(zip((t.name for t in kernel.tensors), fills_of(kernel), strict=True))
    starts = np.frombuffer(fills["starts"].given, np.int32)
    masks = np.frombuffer(fills["masks"].given, np.uint16).reshape(4, 7)
    before = np.frombuffer(fills["fills"].given, np.uint16).reshape(4, 3)
    ones = np.unpackbits(masks.view(np.uint8)).reshape(4, 7, 16).sum(axis=2)
    assert [ones[:, :words].sum(axis=1).tolist() for words in (0, 4, 6)] == before.T.tolist()
    assert (np.diff(starts) * 32 >= ones.sum(axis=1)).all()
    assert fills["columns"].size == starts[-1] * 16 * 32


@pytest.mark.slow
@pytest.mark.parametrize("of", KINDS, ids=lambda of: of.label)
def test_settings_of_every_kind_give_the_bytes_of_the_default(of: TaskKey) -> None:
    settings = other_settings(of, isas.get(HOST.isa))
    measured = local_measurer(HOST).measure(batch(of, settings, working_set=100_000))
    assert [m.knobs for m in measured] == settings
    assert all(len(m.seconds) == len(m.default_seconds) >= 1 for m in measured), measured
    assert all(s > 0 for m in measured for s in m.seconds)


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("of", [KEY, KINDS[9], KINDS[-1]], ids=lambda of: of.label)
def test_any_target_is_measured_by_its_emulator(target: str, of: TaskKey) -> None:
    loaded = Target.load(target)
    settings = other_settings(of, isas.get(loaded.isa))
    for prefix in emulators(loaded):
        run = LocalRunner(prefix)
        measured = ProgramMeasurer(loaded, run).measure(batch(of, settings, threads=2))
        assert all(m.failure is None and m.seconds for m in measured), measured


def misbehaving(shape: LinearShape, isa: Isa, knobs: Knobs) -> Kernel:
    """The real kernel, but for three settings of ``ku``: wrong, crashing, and without an end."""
    kernel = linear.build(shape, isa, knobs)
    if knobs["ku"] == 32:
        return kernel

    def body(block: Any, *buffers: Any) -> None:
        y = buffers[-1]
        if knobs["ku"] == 1:
            T.buffer_store(y, T.float32(1), [block])
        elif knobs["ku"] == 2:
            T.buffer_store(y, T.float32(1), [T.int32(1 << 30)])
            T.buffer_store(y, T.float32(1), [T.int32(-(1 << 30))])
        else:
            with T.While(y[0] < T.float32(1e30)):
                T.buffer_store(y, T.float32(0), [T.int32(0)])

    made = define(f"misbehaving{knobs['ku']}", kernel.tensors, body, grid=1, outputs=["y"])
    return replace(made, tunable=kernel.tunable)


@pytest.fixture
def _misbehaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "linear", replace(TEMPLATES["linear"], build=misbehaving))


WRONG, CRASHING, HANGING = 1, 2, 3  # of ku
GOOD = {"mr": 1, "nv": 2, "pf": 0, "gu": 1, "ku": 32}


@pytest.mark.slow
@pytest.mark.usefixtures("_misbehaving")
def test_what_is_wrong_crashes_or_hangs_is_told_and_the_rest_is_measured() -> None:
    settings = [{**GOOD, "ku": ku} for ku in (32, WRONG, CRASHING, HANGING, 32)]
    measured = local_measurer(HOST).measure(batch(KEY, settings, limit=1.0))
    assert [m.failure for m in measured] == [
        None, "computes other bytes than the default", "ends with signal 11",
        "does not come back", None,
    ]  # fmt: skip
    assert [bool(m.seconds) for m in measured] == [True, False, False, False, True]


def test_a_default_that_fails_is_an_error_that_names_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(shape: LinearShape, isa: Isa, knobs: Knobs) -> Kernel:
        return misbehaving(shape, isa, {**knobs, "ku": CRASHING})

    monkeypatch.setitem(TEMPLATES, "linear", replace(TEMPLATES["linear"], build=crash))
    with pytest.raises(DeviceError, match=r"linear_int4_block_m1_n96_k64: the default kernel ends"):
        local_measurer(HOST).measure(batch(KEY, [GOOD]))


def test_a_program_that_prints_nothing_is_an_error(tmp_path: Any) -> None:
    measurer = ProgramMeasurer(HOST, LocalRunner(["/bin/false"]))
    with pytest.raises(DeviceError, match="ends with status 1"):
        measurer.measure(batch(KEY, [GOOD]))


def test_a_program_that_never_ends_is_ended() -> None:
    ran = LocalRunner(["/bin/sh", "-c", "echo started; sleep 100", "sh"])(b"", [], 0.3)
    assert ran.status is None
    assert ran.stdout == "started\n"
