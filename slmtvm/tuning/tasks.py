"""What there is to tune in a plan: its distinct kernels with knobs, and the calls of each."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slmtvm.plan.model import KernelWork, Plan
from slmtvm.schedules.attention import AttentionShape
from slmtvm.schedules.linear import LinearShape
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.tuning.program import Situation

_FIXED_COST_IN_ROWS = 4
"""What the runtime reckons a step to cost beside its rows (``slm_choose`` of execute.c)."""


Setting = tuple[tuple[str, int], ...]
"""Knobs that can be told apart."""


def setting_of(knobs: Knobs) -> Setting:
    return tuple(sorted(knobs.items()))


@dataclass(frozen=True)
class Workload:
    """What the time of a model is spent on: a prompt of so many tokens, then so many of an answer.

    An encoder's is a text of each of its lengths.
    """

    prompt: int = 200
    generate: int = 200


@dataclass(frozen=True)
class TaskKey:
    """What a kernel computes: of equal keys, equal code for equal knobs."""

    kind: str
    shape: Any  # a TEMPLATES[kind].shape_type

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": dataclasses.asdict(self.shape)}

    @staticmethod
    def from_json(table: Mapping[str, Any]) -> TaskKey:
        """Raises KeyError, TypeError or ValueError where ``table`` is none."""
        kind = str(table["kind"])
        return TaskKey(kind, _shape(TEMPLATES[kind].shape_type, table["shape"]))

    @cached_property
    def text(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True)

    @property
    def label(self) -> str:
        """A short name for people."""
        if isinstance(self.shape, AttentionShape):
            s = self.shape
            parts = [f"m{s.m}", f"h{s.num_heads}", f"kv{s.num_kv_heads}", f"d{s.head_dim}"]
            return "_".join([self.kind, s.kv_dtype, *parts, f"c{s.capacity}"])
        layer = getattr(self.shape, "layer", self.shape)
        parts = [layer.format, layer.activation, f"m{self.shape.m}", f"n{layer.n}", f"k{layer.k}"]
        return "_".join([self.kind, *parts])


@dataclass(frozen=True)
class TuningTask:
    """A key, how often the workload calls it, and the work of a call."""

    key: TaskKey
    calls: float
    work: KernelWork
    situation: Situation


def tuning_tasks(plan: Plan, workload: Workload) -> list[TuningTask]:
    """The distinct tasks of ``plan``, in the order of their kernels' names."""
    times = function_calls(plan, workload)
    calls: dict[str, float] = defaultdict(float)
    for function in plan.functions:
        for step in function.steps:
            calls[step.kernel] += times[function.name, function.rows]
    found: dict[str, TuningTask] = {}
    for name in sorted(plan.kernels):
        code = plan.kernels[name]
        if code.tunable is None or not calls[name]:
            continue
        key = TaskKey(code.tunable.kind, code.tunable.shape)
        situation = _situation(key.shape, workload)
        found[key.text] = TuningTask(key, calls[name], code.work, situation)
    return list(found.values())


def working_set(plan: Plan) -> int:
    """Bytes of weights that a token reads: the layers of a model follow each other."""
    functions = [f for f in plan.functions if not f.name.startswith("batch")]
    rows = {name: min(f.rows for f in functions if f.name == name)
            for name in {f.name for f in functions}}  # fmt: skip
    return sum(
        plan.kernels[step.kernel].work.weight_bytes
        for function in functions
        if rows[function.name] == function.rows
        for step in function.steps
    )


def function_calls(plan: Plan, workload: Workload) -> dict[tuple[str, int], float]:
    """How often the workload calls each function."""
    calls: dict[tuple[str, int], float] = defaultdict(float)
    sizes: dict[str, list[int]] = defaultdict(list)
    for function in plan.functions:
        sizes[function.name].append(function.rows)
    if plan.kind == "encoder":
        return {("body", rows): 1.0 for rows in sizes["body"]}
    left = min(workload.prompt, plan.context)
    padding = 1 if plan.kind == "encoder-decoder" else 1 / 4
    while left > 0:
        cost = {
            rows: _FIXED_COST_IN_ROWS + min(rows, left) + rows / 16 + padding * max(0, rows - left)
            for rows in sizes["body"]
        }
        rows = min(cost, key=lambda rows: (cost[rows] / min(rows, left), -rows))
        calls["body", rows] += 1
        left -= rows
    calls["body", min(sizes["body"])] += workload.generate
    calls["head", min(sizes["head"])] += workload.generate
    for rows in sizes["head"][1:]:
        calls["head", rows] += 1
    for rows in sizes["source"]:
        calls["source", rows] += 1
    return calls


def _situation(shape: Any, workload: Workload) -> Situation:
    """In the middle of the prompt for a chunk, of the answer for a token."""
    rows = int(shape.m)
    if not isinstance(shape, AttentionShape) or not shape.causal:
        return Situation(valid=rows)
    middle = workload.prompt // 2 if rows > 1 else workload.prompt + workload.generate // 2
    return Situation(max(0, min(middle, shape.capacity - rows)), rows)


def _shape(type_: type, table: Mapping[str, Any]) -> Any:
    """A shape dataclass from its fields, those that are dataclasses themselves included."""
    values = {name: _tuples(value) for name, value in table.items()}
    if "layer" in values:
        values["layer"] = LinearShape(**values["layer"])
    return type_(**values)


def _tuples(value: Any) -> Any:
    """``value`` with tuples for lists, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
