"""The tasks of a plan are its distinct kernels, weighted by how often they run."""

from __future__ import annotations

import pytest

from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from slmtvm.tuning.tasks import TaskKey, Workload, tuning_tasks, working_set
from tests.passes import toy, toy_experts
from tests.tuning.tasks import KEY


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(lower(fuse(toy.decoder("int4")), Target.load("x86-64-v3")), {})


def test_layers_of_one_shape_are_one_task(plan: Plan) -> None:
    tasks = tuning_tasks(plan, Workload())
    assert len({t.key.text for t in tasks}) == len(tasks)
    called = [f for f in plan.functions if not f.name.startswith("batch")]
    steps = [s.kernel for f in called for s in f.steps]
    tuned = {n for n in steps if plan.kernels[n].tunable is not None}
    assert len(tasks) == len(tuned)


def test_calls_follow_the_workload(plan: Plan) -> None:
    generating = tuning_tasks(plan, Workload(prompt=0, generate=10))
    assert {t.key.shape.m for t in generating} == {1, 16}  # a head for a prompt's rows as well
    decode = [t for t in generating if t.key.shape.m == 1]
    once = {t.key.text: t.calls for t in tuning_tasks(plan, Workload(prompt=0, generate=1))}
    assert all(t.calls == 10 * once[t.key.text] for t in decode)
    prefill = tuning_tasks(plan, Workload(prompt=64, generate=0))
    body = next(t for t in prefill if t.key.kind == "attend" and t.key.shape.m == 16)
    assert body.calls == 4 * 2  # 64 tokens are four chunks of 16, in two layers
    assert body.situation.position == 32


def test_the_working_set_is_what_a_token_reads(plan: Plan) -> None:
    by_hand = sum(
        plan.kernels[s.kernel].work.weight_bytes
        for f in plan.functions
        if f.rows == 1
        for s in f.steps
    )
    assert working_set(plan) == by_hand > 0


def test_a_key_is_read_as_it_was_written(plan: Plan) -> None:
    experts = build_plan(lower(fuse(toy_experts.decoder()), Target.load("x86-64-v3")), {})
    for made in (plan, experts):
        for task in tuning_tasks(made, Workload()):
            assert TaskKey.from_json(task.key.to_json()) == task.key
    kinds = {t.key.kind for t in tuning_tasks(experts, Workload())}
    assert kinds == {"linear", "routed_linear"}  # the toy has no attention


def test_a_label_says_what_the_layer_is() -> None:
    assert KEY.label == "linear_int4_block_m1_n96_k64"
