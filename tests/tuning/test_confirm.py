"""What kernels alone promise is tried in the whole model, family by family where that loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slmtvm.bench.busy import Busy
from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.planner import Planner
from slmtvm.schedules import isa as isas
from slmtvm.schedules.templates import TEMPLATES, KnobChoice, default_choice
from slmtvm.target import Target
from slmtvm.tuning.choice import RecordedChoice, chosen_setup
from slmtvm.tuning.compare import Compared, Comparer, Phase, Side, phases
from slmtvm.tuning.confirm import Confirmer
from slmtvm.tuning.devices import DeviceMeasurer
from slmtvm.tuning.division import OTHER_CHUNKS, DivisionSearch
from slmtvm.tuning.records import RecordFile, RecordLog, read_log
from slmtvm.tuning.tasks import TaskKey, Workload, tuning_tasks
from slmtvm.tuning.tune import local_measurer
from slmtvm.tuning.whole import Confirmation, Turns
from tests.passes import toy
from tests.schedules.harness import emulators
from tests.tuning.farm import farm
from tests.tuning.tasks import HOST, record

WORK = Workload(prompt=48, generate=16)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(toy.decoder("int4"))


@pytest.fixture(scope="module")
def promises(planner: Planner) -> RecordLog:
    """For each kernel a setting, other than the default, that was faster alone."""
    isa, found = isas.get(HOST.isa), []
    for task in tuning_tasks(planner.plan(HOST), WORK):
        settings = TEMPLATES[task.key.kind].settings(task.key.shape, isa)
        found.append(record(task.key, knobs=settings[-1]))
    return RecordLog(tuple(found))


class FakeComparer:
    """Builds nothing; a phase takes what ``cost`` says of the settings that are not defaults."""

    def __init__(
        self,
        planner: Planner,
        kernels: Sequence[TaskKey],
        cost: Callable[[str, set[str], Setup], float],
    ) -> None:
        self.planner, self.target = planner, HOST
        self._kernels, self._cost = kernels, cost
        self.built: list[tuple[set[str], Setup]] = []
        self.timed: list[list[str]] = []

    def build(self, choose: KnobChoice = default_choice, setup: Setup = DEFAULT_SETUP) -> Path:
        isa, changed = isas.get(HOST.isa), set()
        for key in self._kernels:
            default = TEMPLATES[key.kind].default_knobs(key.shape, isa)
            if choose(key.kind, key.shape, isa) != default:
                changed.add(f"{key.kind} {key.shape.m}")
        self.built.append((changed, setup))
        return Path(str(len(self.built) - 1))

    def compare(self, default: Side, other: Side, timed: Sequence[Phase], what: str) -> Compared:
        self.timed.append([p.name for p in timed])
        found = {}
        for phase in timed:
            seconds = [
                self._cost(phase.name, *self.built[int(side.bundle.name)])
                for side in (other, default)
            ]
            found[phase.name] = Turns(phase.name, *((s,) * 7 for s in seconds))
        return Compared(found, {"cpu": "fake"}, busy=Busy(0, 0))


def is_head_of_many(key: TaskKey) -> bool:
    """What neither a prompt nor an answer calls."""
    return key.shape.m > 1 and getattr(key.shape, "n", 0) == toy.VOCAB


def confirm(
    planner: Planner,
    log: RecordLog,
    path: Path,
    cost: Callable[[str, set[str], Setup], float],
) -> tuple[FakeComparer, list[Confirmation]]:
    fake = FakeComparer(planner, [r.key for r in log.kernels], cost)
    file = RecordFile(path)
    file.append([])
    confirmer = Confirmer(fake, file, WORK)  # type: ignore[arg-type]
    confirmer.run(log)
    assert list(read_log(path).confirmations) == confirmer.found
    return fake, confirmer.found


@pytest.mark.slow
def test_a_model_that_is_faster_as_a_whole_is_compared_once(
    planner: Planner, promises: RecordLog, tmp_path: Path
) -> None:
    fake, found = confirm(planner, promises, tmp_path / "r", lambda _, some, __: 2.0 - bool(some))
    assert len(fake.timed) == 1 and all(c.confirmed for c in found)
    assert {c.turns.phase for c in found if c.turns} == {"prefill", "decode"}
    told = {k for c in found for k, _ in c.settings}
    assert told == {r.key for r in promises.kernels if not is_head_of_many(r.key)}
    again, nothing = confirm(
        planner, RecordLog(promises.kernels, tuple(found)), tmp_path / "s", lambda *_: 1.0
    )
    assert not nothing and not again.built


@pytest.mark.slow
def test_where_a_phase_loses_its_families_are_tried_by_themselves(
    planner: Planner, promises: RecordLog, tmp_path: Path
) -> None:
    def cost(phase: str, tuned: set[str], _: Setup) -> float:
        if phase == "prefill":
            return 1.0 - 0.1 * bool(tuned)
        return 1.0 + 0.3 * ("decode 1" in tuned) - 0.1 * ("linear 1" in tuned)

    fake, found = confirm(planner, promises, tmp_path / "r", cost)
    said = {c.family: c.confirmed for c in found}
    assert said == {
        "prefill, all kernels": True, "decode, all kernels": False,
        "decode, linear int4": True, "decode, decode float16": False,
    }  # fmt: skip
    assert fake.timed == [["decode", "prefill"], ["decode"], ["decode"]]
    log = RecordLog(promises.kernels, tuple(found))
    choice = RecordedChoice(log, HOST)
    planner.plan(HOST, choice)
    taken = {(c.key.kind, c.key.shape.m) for c in choice.used if c.confirmed}
    assert ("linear", 1) in taken and not any(kind == "decode" for kind, _ in taken)


@pytest.mark.slow
def test_families_that_gain_alone_but_not_together_leave_the_best(
    planner: Planner, promises: RecordLog, tmp_path: Path
) -> None:
    def cost(phase: str, tuned: set[str], _: Setup) -> float:
        one, other = "linear 1" in tuned, "decode 1" in tuned
        return 1.0 if phase == "prefill" else {(0, 0): 1, (1, 0): 0.8, (0, 1): 0.9, (1, 1): 1.1}[
            (one, other)
        ]  # fmt: skip

    _, found = confirm(planner, promises, tmp_path / "r", cost)
    choice = RecordedChoice(RecordLog(promises.kernels, tuple(found)), HOST)
    planner.plan(HOST, choice)
    assert {c.key.kind for c in choice.used if c.key.shape.m == 1} == {"linear"}


@pytest.mark.slow
def test_divisions_go_on_from_what_was_faster_and_are_taken_against_the_default(
    planner: Planner, tmp_path: Path
) -> None:
    best = Setup((1, 8, 64), 8 * 1024, 1)

    def cost(_: str, __: set[str], setup: Setup) -> float:
        return 1.0 - 0.1 * sum(
            getattr(setup, name) == getattr(best, name)
            for name in ("chunks", "parallel_bytes", "threads")
        )

    fake = FakeComparer(planner, [], cost)
    search = DivisionSearch(
        fake, RecordFile(tmp_path / "r"), WORK, default_choice, threads=1, cores=2  # type: ignore[arg-type]
    )  # fmt: skip
    search.run()
    records = read_log(tmp_path / "r").setups
    assert list(records) == search.found
    assert {r.setup.chunks for r in records} >= set(OTHER_CHUNKS)
    assert chosen_setup(records, planner.architecture, HOST) == best
    tuned = planner.plan(HOST, setup=best)
    assert sorted(f.rows for f in tuned.functions if f.name == "body") == [1, 8, 64]
    assert (tuned.parallel_bytes, tuned.threads) == (8 * 1024, 1)


def test_one_core_has_nothing_to_divide(planner: Planner, tmp_path: Path) -> None:
    fake = FakeComparer(planner, [], lambda *_: 1.0)
    search = DivisionSearch(fake, RecordFile(tmp_path / "r"), WORK, default_choice)  # type: ignore[arg-type]
    search.run()
    assert all(r.setup.threads == 0 and not r.faster for r in search.found)


def test_an_architecture_is_known_by_its_layers_and_not_by_their_values(planner: Planner) -> None:
    assert Planner(toy.decoder("int4", seed=3)).architecture == planner.architecture
    assert Planner(toy.decoder("f32")).architecture != planner.architecture


def settings(planner: Planner, target: Target) -> dict[TaskKey, Any]:
    isa = isas.get(target.isa)
    tasks = tuning_tasks(planner.plan(target), WORK)
    return {t.key: TEMPLATES[t.key.kind].settings(t.key.shape, isa)[-1] for t in tasks}


@pytest.fixture
def boards() -> Iterator[str]:
    with farm() as made:
        made.runner("cortex-a78", emulators(Target.load("cortex-a78"))[0])
        yield made.address


@pytest.mark.slow
def test_bundles_are_compared_in_turns_on_this_machine(planner: Planner, tmp_path: Path) -> None:
    knobs = {k.text: v for k, v in settings(planner, HOST).items()}
    comparer = Comparer(planner, HOST, local_measurer(HOST), tmp_path, turns=3)
    timed = phases(planner.plan(HOST), WORK)
    default = comparer.build()
    tuned = comparer.build(lambda kind, shape, isa: knobs.get(TaskKey(kind, shape).text)
                           or TEMPLATES[kind].default_knobs(shape, isa),
                           Setup((1, 8, 64), 0, 1))  # fmt: skip
    compared = comparer.compare(Side(default), Side(tuned, 0), timed, "both")
    assert compared.failure is None and compared.turns.keys() == {"prefill", "decode"}
    assert all(len(t.ratios) == 3 for t in compared.turns.values())
    other = Comparer(Planner(toy.decoder("int4", seed=9)), HOST, local_measurer(HOST), tmp_path)
    other._made = 9
    wrong = comparer.compare(Side(default), Side(other.build()), timed, "wrong")
    assert wrong.failure == "computes other bits than the default" and not wrong.turns


@pytest.mark.slow
def test_a_board_of_a_tracker_confirms(planner: Planner, boards: str, tmp_path: Path) -> None:
    target = Target.load("cortex-a78")
    file = RecordFile(tmp_path / "r.jsonl")
    key, knobs = next((k, v) for k, v in settings(planner, target).items() if k.shape.m == 1)
    file.append([record(key, knobs=knobs, target=target.name, isa=target.isa)])
    with DeviceMeasurer(target, boards, "cortex-a78", wait_s=30) as measurer:
        comparer = Comparer(planner, target, measurer, tmp_path, turns=3)
        confirmer = Confirmer(comparer, file, Workload(20, 8))
        confirmer.run(read_log(file.path))
    (said,) = read_log(file.path).confirmations
    assert said.settings == ((key, knobs),) and said.turns and said.turns.phase == "decode"
    assert said.provenance.device["key"] == "cortex-a78" and said.provenance.device["exec"]
