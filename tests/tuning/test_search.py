"""The search finds good settings in few trials, and stops when there is nothing to gain."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from slmtvm.errors import SlmError
from slmtvm.plan.model import KernelWork
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.tuning.cost_model import CostModel, import_xgboost
from slmtvm.tuning.measuring import Measurement
from slmtvm.tuning.program import Situation
from slmtvm.tuning.search import TaskSearch
from slmtvm.tuning.tasks import TaskKey, TuningTask
from tests.tuning.tasks import key, record

ISA = isas.get("avx2")
PREFILL = key(m=128, n=1536, k=576)

Speed = Callable[[Knobs], float]


def ratio(knobs: Knobs) -> float:
    """As measured kernels behave: bigger tiles gain until registers spill; little else matters."""
    registers = 2 * knobs["mr"] * knobs["nv"]
    spilled = 0.1 * max(0, registers - 14)
    reuse = 1 / knobs["mr"] + 1 / knobs["nv"]
    return (
        0.4
        + 0.5 * reuse
        + spilled
        + 0.03 * abs(np.log2(knobs["ku"]) - 6)
        + 0.05 * (knobs["pf"] > 0)
        + 0.1 / knobs["rt"]
    )


def search_of(of: TaskKey, model: CostModel, seed: int) -> TaskSearch:
    return TaskSearch(TuningTask(of, 1.0, KernelWork(), Situation()), ISA, model, seed)


def run(search: TaskSearch, noise: float, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    default = ratio(TEMPLATES["linear"].default_knobs(search.task.key.shape, ISA))
    while search.trials < most and not search.done:
        measured = []
        for knobs in search.propose(min(8, most - search.trials)):
            seconds = tuple(ratio(knobs) / default * rng.normal(1, noise, 5))
            measured.append(Measurement(knobs, seconds, (1.0,) * 5))
        search.update(measured)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_good_setting_is_found_in_a_small_part_of_the_space(seed: int) -> None:
    search = search_of(PREFILL, CostModel(), seed)
    run(search, 0.03, seed, most=round(0.15 * search.space_size))
    space = TEMPLATES["linear"].settings(PREFILL.shape, ISA)
    assert ratio(search.best[0]) <= 1.05 * min(map(ratio, space))


@pytest.mark.slow
def test_what_was_learnt_of_one_shape_is_known_of_the_next() -> None:
    model = CostModel()
    run(search_of(PREFILL, model, 0), 0.03, 0, most=40)
    second = search_of(key(m=128, n=576, k=1536), model, 0)
    run(second, 0.03, 1, most=8)
    space = TEMPLATES["linear"].settings(second.task.key.shape, ISA)
    assert ratio(second.best[0]) <= 1.05 * min(map(ratio, space))


def test_a_search_ends_when_batches_gain_nothing() -> None:
    search = search_of(PREFILL, CostModel(), 0)
    while not search.done:
        search.update([Measurement(k, (1.0,) * 3, (1.0,) * 3) for k in search.propose(8)])
    assert search.trials == 24
    assert search.expected_gain() == 0
    assert search.best[1] == 1


def test_nothing_is_measured_twice_and_failures_are_not_taken() -> None:
    search = search_of(key(m=1), CostModel(), 0)
    seen = []
    while batch := search.propose(8):
        seen += [tuple(sorted(k.items())) for k in batch]
        search.update([Measurement(k, failure="ends with signal 4") for k in batch])
    assert len(seen) == len(set(seen)) == search.space_size - 1
    assert search.best[1] == 1


@pytest.mark.slow
def test_what_records_hold_is_not_measured_again() -> None:
    search = search_of(PREFILL, CostModel(), 0)
    first = search.propose(8)
    search.resume([record(PREFILL, knobs=k, ratio=0.5) for k in first])
    assert search.best[1] == pytest.approx(0.5)
    assert not [k for k in search.propose(search.space_size) if k in first]


def test_a_batch_is_the_same_for_the_same_seed() -> None:
    batches = [search_of(PREFILL, CostModel(), 3).propose(8) for _ in range(2)]
    assert batches[0] == batches[1]
    assert len({tuple(b.values()) for b in batches[0]}) == 8


def test_without_xgboost_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(SlmError, match=r"pip install 'slmtvm\[tune\]'"):
        import_xgboost()
