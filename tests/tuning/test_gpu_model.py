"""The model of a GPU ranks settings by how many teams read at once, and needs no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.codegen.cuda.launches import launch
from slmtvm.codegen.cuda.nodes import single
from slmtvm.codegen.cuda.text import teams_of
from slmtvm.codegen.cuda.translate import translate
from slmtvm.plan.model import Ref, Space
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import Target
from slmtvm.tuning.gpu_model import GpuModel
from slmtvm.tuning.tasks import TaskKey

ORIN = Target.load("jetson-orin")
CUDA = isas.get("cuda")
ROW = LinearShape(1, 576, 576, "int4", "block", 32, scale_dtype="float16")


def test_a_block_of_threads_has_as_many_teams_as_the_knob_says() -> None:
    assert ORIN.cuda is not None
    default = linear.default_knobs(ROW, CUDA)
    assert default["teams"] == 0
    found = {}
    for teams in linear.knob_space(ROW, CUDA)["teams"]:
        kernel = linear.build(ROW, CUDA, {**default, "teams": teams})
        made = translate(f"k{teams}", kernel.func, kernel.scalars, False, teams_of(kernel.tunable))
        refs = [Ref(Space.ARENA, 0, 0)] * len(kernel.tensors)
        found[teams] = launch(single(made, refs, kernel.grid), ORIN.cuda)
    assert {teams: spread.teams for teams, spread in found.items() if teams} == {
        teams: teams for teams in found if teams
    }
    assert all(spread.blocks * spread.teams >= 36 for spread in found.values())
    assert "teams" not in linear.knob_space(ROW, isas.get("avx2"))


def test_what_asks_for_more_or_spreads_wider_costs_less() -> None:
    model, default = GpuModel(ORIN), linear.default_knobs(ROW, CUDA)
    key = TaskKey("linear", ROW)
    few, more = model.costs(key, [{**default, "gu": 1}, default])
    assert more < few
    rows = TaskKey("linear", LinearShape(64, 96, 4096, "int8", "row_u8"))
    products = {**linear.default_knobs(rows.shape, CUDA), "mr": 8, "nv": 1, "ku": 128}
    narrow, wide = model.costs(rows, [{**products, "teams": 16}, {**products, "teams": 2}])
    assert wide < narrow  # all multiprocessors multiply, or a few of them
    large = TaskKey("linear", LinearShape(1, 49152, 576, "int4", "block", 32))
    (seconds,) = model.costs(large, [linear.default_knobs(large.shape, CUDA)])
    assert seconds > 49152 * 576 / 2 / 102.4e9  # no faster than memory


@pytest.mark.slow
def test_settings_are_ranked_without_a_gpu(tmp_path: Path) -> None:
    from slmtvm.tuning.ranking import rank
    from tests.models import model_path

    report = rank(model_path("int4"), ORIN, records=tmp_path / "orin.jsonl", settings=4, context=64)
    assert report.by == "a model of the GPU"
    assert {ranked.task.key.kind for ranked in report.tasks} <= TEMPLATES.keys()
    assert all(0 < ranked.ratio <= 1 and ranked.settings for ranked in report.tasks)
    lines = (tmp_path / "orin.jsonl").read_text().splitlines()
    assert lines and all('"about": "static"' in line for line in lines)
