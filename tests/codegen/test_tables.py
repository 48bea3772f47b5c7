"""A plan that would touch memory outside its own never becomes a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from slmtvm.codegen.tables import write_tables
from slmtvm.codegen.weights import merge_weights
from slmtvm.plan.model import Plan, Ref, Space, Step
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder, toy_encoder

Change = Callable[[Plan], Plan]


def with_step(change: Callable[[Step], Step], function: int = 0, step: int = 0) -> Change:
    def apply(plan: Plan) -> Plan:
        functions = list(plan.functions)
        steps = list(functions[function].steps)
        steps[step] = change(steps[step])
        functions[function] = replace(functions[function], steps=tuple(steps))
        return replace(plan, functions=tuple(functions))

    return apply


def with_argument(index: int, ref: Ref) -> Change:
    return with_step(
        lambda step: replace(step, args=(*step.args[:index], ref, *step.args[index + 1 :]))
    )


def with_limits(ref: Ref) -> Change:
    return lambda plan: replace(plan, mask="keys", limits=ref)


BAD_DECODERS: dict[str, tuple[Change, str]] = {
    "tokens": (with_argument(0, Ref(Space.TOKENS, 0, 17 * 4)), "ends behind"),
    "weights": (with_argument(1, Ref(Space.WEIGHTS, 1 << 20, 64)), "ends behind"),
    "arena": (with_argument(2, Ref(Space.ARENA, 0, 1 << 20)), "ends behind"),
    "state": (with_argument(2, Ref(Space.STATE, 64, 64 * 84 * 4)), "ends behind"),
    "scratch": (with_argument(2, Ref(Space.SCRATCH, 384, 64)), "ends behind"),
    "output": (with_argument(2, Ref(Space.OUTPUT, 0, 17 * 101 * 4)), "ends behind"),
    "alignment": (with_argument(2, Ref(Space.ARENA, 4, 64)), "Ref"),
    "negative offset": (with_argument(2, Ref(Space.ARENA, -64, 64)), "Ref"),
    "negative size": (with_argument(2, Ref(Space.ARENA, 64, -64)), "Ref"),
    "few arguments": (with_step(lambda s: replace(s, args=s.args[:-1])), "2 arguments"),
    "kernel": (with_step(lambda s: replace(s, kernel="none")), "no such kernel"),
    "grid": (with_step(lambda s: replace(s, grid=0)), "grid 0"),
    "kind": (lambda p: replace(p, kind="other"), "unknown kind"),
    "encoder with heads": (lambda p: replace(p, kind="encoder"), "an encoder none"),
    "no body": (lambda p: replace(p, functions=p.functions[-1:]), "no body"),
    "capacity": (lambda p: replace(p, capacity=p.context - 1), "capacity"),
    "only large chunks": (
        lambda p: replace(p, functions=(p.functions[0], p.functions[-1])), "chunks of 16"
    ),
    "hidden": (lambda p: replace(p, hidden=Ref(Space.ARENA, 0, 64)), "hidden"),
    "mask": (lambda p: replace(p, mask="some"), "unknown mask"),
    "no limits": (lambda p: replace(p, mask="keys"), "need limits"),
    "limits without a mask": (lambda p: replace(p, limits=Ref(Space.STATE, 0, 256)), "need limits"),
    "few limits": (with_limits(Ref(Space.STATE, 0, 192)), "do not hold 64 positions"),
    "limits elsewhere": (with_limits(Ref(Space.ARENA, 0, 256)), "not in the state"),
    "limits behind the state": (with_limits(Ref(Space.STATE, 1 << 20, 256)), "behind the state"),
    "odd limits": (with_limits(Ref(Space.STATE, 4, 256)), "not aligned"),
    "odd scratch": (lambda p: replace(p, scratch_bytes=400), "scratch_bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DECODERS)
def test_a_bad_plan_is_refused_with_the_reason(name: str) -> None:
    change, message = BAD_DECODERS[name]
    weights, (plan,) = merge_weights([toy_decoder()])
    if name == "only large chunks":
        plan = replace(plan, capacity=plan.context)
    with pytest.raises(ValueError, match=message):
        write_tables(change(plan), Target.load("x86-64-v3"), weights)


@pytest.mark.parametrize("plan", [toy_decoder(), toy_encoder()], ids=["decoder", "encoder"])
def test_the_tables_name_the_weights_they_belong_to(plan: Plan) -> None:
    weights, (merged,) = merge_weights([plan])
    text = write_tables(merged, Target.load("cortex-a72"), weights)
    assert f".weights_id = {weights.content_id}u" in text
