"""MetaSchedule's own runner measures on ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from tvm.s_tir import meta_schedule as ms

from slmtvm.rpc.program import build_program
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.target import Target
from tests.rpc.processes import Runner, Tracker


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # TVM's client leaves what it uploads open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_meta_schedules_rpc_runner_measures_a_kernel(
    tracker: Tracker, runner: Runner, tmp_path: Path
) -> None:
    target = Target.load("host")
    kernel = linear.build(linear.LinearShape(3, 48, 64, "f32", "f32"), isas.get(target.isa))
    build_program({"layer": kernel}, target, tmp_path / "program")
    arguments = [ms.arg_info.TensorInfo(t.dtype, t.shape) for t in kernel.tensors]
    measure = ms.runner.RPCRunner(
        ms.runner.RPCConfig("127.0.0.1", tracker.port, "test", session_timeout_sec=30),
        ms.runner.EvaluatorConfig(number=2, repeat=3, enable_cpu_cache_flush=True),
    )
    good, bad = (
        future.result()
        for future in measure.run([
            ms.runner.RunnerInput(str(tmp_path / "program"), "cpu", arguments),
            ms.runner.RunnerInput(str(tmp_path / "program"), "cpu", arguments[1:]),
        ])
    )  # fmt: skip
    assert good.error_msg is None
    assert len(good.run_secs) == 3
    assert all(0 < float(seconds) < 1 for seconds in good.run_secs)
    assert "takes 3 tensors, not 2" in bad.error_msg
