"""The times of kernels that a model opened for profiling collects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slmtvm.errors import DeviceError
from slmtvm.runtime import Session, load
from slmtvm.runtime.model import Model
from tests.runtime.toy import CHUNKS, toy_decoder


@pytest.mark.parametrize("threads", [1, 2])
def test_every_call_of_a_kernel_is_counted_once(decoder: Path, threads: int) -> None:
    with Session(Model(decoder, threads=threads, profile=True), owns_model=True) as session:
        session.eval(list(range(CHUNKS[0] + 1)))  # the largest chunk, and a single token
        profile = session.model.take_profile()
        steps = {f.rows: f.steps for f in toy_decoder().functions if f.name == "body"}
        for step in (*steps[CHUNKS[0]], *steps[1]):
            time = profile[step.kernel]
            assert time.calls == 1, step.kernel
            assert 0 < time.own_nanoseconds <= time.nanoseconds
        assert sum(time.calls for time in profile.values()) == len(steps[1]) * 2 + 1  # the head
        assert not any(time.calls for time in session.model.take_profile().values())


def test_profiling_changes_no_result(decoder: Path) -> None:
    with (
        load(decoder) as plain,
        Session(Model(decoder, profile=True), owns_model=True) as profiled,
    ):
        tokens = [3, 1, 4, 1, 5, 9]
        assert np.array_equal(plain.eval_all(tokens), profiled.eval_all(tokens))


def test_without_profiling_asked_for_there_is_no_profile(decoder: Path) -> None:
    with load(decoder) as session, pytest.raises(DeviceError, match="not opened with SLM_PROFILE"):
        session.model.take_profile()
