"""Which layers skip zeros, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slmtvm.ir.lowered import LoweredModel, sparse_note
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels import lower_kernels
from slmtvm.passes.pipeline import fuse
from slmtvm.plan.build import build_plan
from slmtvm.schedules import isa as isas
from slmtvm.schedules.linear import blocks, columns, listed_blocks, listed_weights
from slmtvm.schedules.linear.packed_rows import pack_rows, unpack_rows
from slmtvm.target import Target
from tests.passes.toy import decoder

HEAD, DOWN = "head.weight", "0.down.weight"


@pytest.fixture(autouse=True)
def _as_in_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a list takes beside its blocks is left out: it is more than the toy's small layers."""
    for kernel, cost in (
        (blocks, "list_cost"),
        (listed_blocks, "listed_blocks"),
        (listed_weights, "listed_weights"),
    ):
        monkeypatch.setattr(
            kernel,
            "relative_time",
            lambda shape, isa, density, cost=cost: getattr(isa, cost).step * density,
        )


def with_zeros(share: float, *names: str) -> CanonicalModel:
    """A decoder with int8 layers; in those named, so many blocks of 32x4 are zero."""
    model = decoder("int8", layers=1)
    rng, params = np.random.default_rng(0), dict(model.params)
    for name in names:
        weight = params[name].copy()
        zero = rng.random((-(-weight.shape[0] // 32), weight.shape[1] // 4)) < share
        weight[np.repeat(np.repeat(zero, 32, axis=0), 4, axis=1)[: len(weight)]] = 0
        params[name] = weight
    return replace(model, params=params)


def lowered(model: CanonicalModel, target: str = "x86-64-v3", sparse: str = "auto") -> LoweredModel:
    return lower_kernels(fuse(model), Target.load(target), sparse=sparse)


def kernels(made: LoweredModel) -> set[bool]:
    """Whether kernels of linear layers read lists of blocks."""
    return {"_blocks" in name for name in made.kernels if name.startswith("linear")}


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4-vnni", "cortex-a72", "riscv64-rvv"])
def test_a_layer_with_most_blocks_zero_skips_them_for_every_number_of_rows(target: str) -> None:
    made = lowered(with_zeros(0.9, HEAD), target)
    (layer,) = made.sparse
    assert (layer.name, layer.taken) == (HEAD, True)
    assert layer.density < 0.3 and layer.relative_time < 0.9
    heads = [name for name in made.weights if name.startswith(f"{HEAD}@")]
    assert all(name.startswith(f"{HEAD}@blocks") for name in heads)
    assert kernels(made) == {True, False}
    assert sparse_note(made.sparse).startswith("1 of 1 layers")


def test_a_small_layer_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for cost in ("listed_blocks", "listed_weights"):
        monkeypatch.setattr(type(isas.get("avx2")), cost, None)
    (layer,) = lowered(with_zeros(0.9, HEAD)).sparse
    assert not layer.taken


def test_a_layer_with_few_zero_blocks_stays_dense_and_is_named() -> None:
    made = lowered(with_zeros(0.2, HEAD))
    (layer,) = made.sparse
    assert not layer.taken and layer.facts()["kernel"] == "dense"
    assert kernels(made) == {False}
    assert "run on dense kernels" in sparse_note(made.sparse)


def test_dense_layers_and_off_change_nothing() -> None:
    assert lowered(with_zeros(0.0)).sparse == ()
    made = lowered(with_zeros(0.9, HEAD), sparse="off")
    assert made.sparse == () and kernels(made) == {False}


def test_layers_of_one_shape_share_a_kernel_whatever_their_zeros() -> None:
    model = decoder("int8", layers=2)
    rng, params = np.random.default_rng(0), dict(model.params)
    for name, weight in params.items():
        if weight.dtype == np.int8:
            zero = rng.random(weight.shape[1] // 4) < 0.9 + 0.1 * rng.random()
            params[name] = np.where(np.repeat(zero, 4), 0, weight).astype(np.int8)
    made = lowered(replace(model, params=params))
    assert kernels(made) == {True}
    dense = lowered(replace(model, params=params), sparse="off")
    assert len(made.kernels) == len(dense.kernels)
    assert len(made.sparse) == 9  # q, k, v and gate, up are merged: four for each layer, the head


@pytest.mark.slow
def test_the_work_of_a_kernel_is_that_of_the_blocks_left() -> None:
    model = with_zeros(0.9, HEAD)
    sparse, dense = (build_plan(lowered(model, sparse=how), {}) for how in ("auto", "off"))
    (head,), (whole,) = (
        [code.work for name, code in plan.kernels.items() if "m1_n112_k64" in name]
        for plan in (sparse, dense)
    )
    (layer,) = lowered(model).sparse
    assert head.multiply_adds == pytest.approx(layer.density * whole.multiply_adds, rel=0.01)
    assert head.weight_bytes < 0.6 * whole.weight_bytes


def of_neighbours(kept: int, size: int) -> CanonicalModel:
    """A decoder whose head has ``kept`` of every ``size`` neighbours along k."""
    model = decoder("int8", layers=1)
    weight = model.params[HEAD].copy()
    order = np.random.default_rng(0).random((len(weight), weight.shape[1] // size, size))
    weight[order.argsort(axis=2).reshape(weight.shape) >= kept] = 0
    return replace(model, params={**model.params, HEAD: weight})


@pytest.mark.parametrize(
    ("target", "kept", "kernel"),
    [
        ("x86-64-v3", 2, "4of8"),
        ("x86-64-v3", 1, "4of16"),
        ("cortex-a78", 1, "4of16"),
        ("cortex-a78", 2, "dense"),
        ("riscv64-rvv", 1, None),
    ],
)
def test_neighbours_are_picked_where_that_is_expected_to_be_faster(
    target: str, kept: int, kernel: str | None
) -> None:
    made = lowered(of_neighbours(kept, 4), target)
    assert [layer.facts()["kernel"] for layer in made.sparse] == [kernel] * (kernel is not None)
    picking = {name for name in made.kernels if kernel and f"_{kernel}_" in name}
    assert bool(picking) == (kernel not in ("dense", None))


def test_a_pattern_that_is_broken_in_one_place_runs_dense() -> None:
    model = of_neighbours(2, 4)
    model.params[HEAD][77, 8:16] = 1
    made = lowered(model)
    assert made.sparse == ()
    assert not any("_4of8_" in name for name in made.kernels)


def int4_of_pairs() -> CanonicalModel:
    """A decoder with int4 weights whose head has two of every four neighbours."""
    model = decoder("int4", layers=1)
    return replace(model, params={**model.params, HEAD: in_pairs(model.params[HEAD])})


def in_pairs(weight: np.ndarray) -> np.ndarray:
    """Packed int4 weights, two of every four neighbours zero."""
    values = unpack_rows(weight, 2 * weight.shape[1], 4)
    order = np.random.default_rng(0).random((len(values), values.shape[1] // 4, 4))
    values[order.argsort(axis=2).reshape(values.shape) >= 2] = 8
    return pack_rows(values, 4)


@pytest.mark.parametrize(
    ("target", "kernel"),
    [("x86-64-v3", "2of4"), ("cortex-a78", "dense"), ("riscv64-rvv", None)],
)
def test_pairs_of_int4_are_taken_where_every_number_of_rows_gains(
    target: str, kernel: str | None
) -> None:
    made = lowered(int4_of_pairs(), target)
    assert [layer.facts()["kernel"] for layer in made.sparse] == [kernel] * (kernel is not None)
    assert any("_2of4_" in name for name in made.kernels) == (kernel == "2of4")


def test_pairs_stay_dense_where_some_number_of_rows_does_not_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(isas.get("avx2")), "pair_times", (0.8, 0.95))
    (layer,) = lowered(int4_of_pairs()).sparse
    assert not layer.taken


def test_pairs_of_many_rows_meet_rows_that_are_turned_once_for_all_layers() -> None:
    model = decoder("int4", layers=1)
    params = {
        name: in_pairs(array) if array.dtype == np.uint8 else array
        for name, array in model.params.items()
    }
    fused = fuse(replace(model, params=params), chunks=(1, 16, 64))
    made = lower_kernels(fused, Target.load("x86-64-v3"), sparse="2of4")
    turned = [name for name in made.kernels if "_2of4_turned_" in name]
    assert turned and all("_m64_" in name for name in turned)
    # q, k and v are merged, as gate and up are: four layers, each with rows of its own.
    body = str(made.module["body_64"])
    assert [body.count(f'"{name}') for name in ("turn_pairs_", "linear_int4")] == [4, 4]


@pytest.mark.slow
def test_a_format_that_is_asked_for_is_taken_wherever_it_fits_and_no_other_one() -> None:
    forced = lowered(int4_of_pairs(), "cortex-a78", sparse="2of4")
    assert [layer.taken for layer in forced.sparse] == [True]
    assert lowered(int4_of_pairs(), sparse="blocks").sparse == ()
    asked = lowered(of_neighbours(1, 4), sparse="4of8")
    assert [layer.kernel for layer in asked.sparse if layer.taken] == ["4of8"]


def test_pairs_that_are_broken_in_one_place_run_dense() -> None:
    model = int4_of_pairs()
    model.params[HEAD][77, 8:10] = 0x11
    made = lowered(model)
    assert made.sparse == () and not any("_2of4_" in name for name in made.kernels)


def float_with_zeros(share: float) -> CanonicalModel:
    """A decoder in float32, of one of whose layers so many weights are zero."""
    model = decoder("f32", layers=1)
    weight = model.params[DOWN].copy()
    weight[np.random.default_rng(0).random(weight.shape) < share] = 0
    return replace(model, params={**model.params, DOWN: weight})


def test_free_zeros_of_floats_are_skipped_by_steps_of_many_rows_alone() -> None:
    made = lowered(float_with_zeros(0.8), sparse="rows")
    assert [layer.taken for layer in made.sparse] == [True]
    lists = [n for n in made.kernels if n.startswith("linear_f32") and "_rows_" in n]
    assert lists and all(int(n.split("_m")[1].split("_")[0]) == 16 for n in lists)
    stored = {name.split("@")[1].split(".")[0] for name in made.weights if name.startswith(DOWN)}
    assert len(stored) == 2, "few rows have their own weights"
    assert lowered(float_with_zeros(0.5), "riscv64-rvv", sparse="rows").sparse == ()


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4-vnni", "cortex-a78"])
def test_short_blocks_of_int8_are_skipped_by_steps_of_many_rows_alone(target: str) -> None:
    model = decoder("int8", layers=1)
    weight = model.params[HEAD].copy()
    zero = np.random.default_rng(0).random((len(weight), weight.shape[1] // 4)) < 0.8
    weight[np.repeat(zero, 4, axis=1)] = 0
    made = lowered(replace(model, params={**model.params, HEAD: weight}), target)
    (layer,) = made.sparse
    assert (layer.kernel, layer.taken) == ("rows", True) and layer.density < 0.25
    lists = [n for n in made.kernels if n.startswith("linear_int8") and "_rows_" in n]
    assert lists and all(int(n.split("_m")[1].split("_")[0]) >= 16 for n in lists)
    assert any(n.startswith("turn_rows_") for n in made.kernels)


@pytest.mark.parametrize(
    ("target", "kernel"),
    [("x86-64-v3", "free"), ("x86-64-v4-vnni", "rows"), ("cortex-a78", "rows")],
)
def test_zeros_anywhere_in_int8_are_skipped_one_by_one_where_a_kernel_does(
    target: str, kernel: str
) -> None:
    model = decoder("int8", layers=1)
    weight = model.params[HEAD].copy()
    weight[np.random.default_rng(0).random(weight.shape) < 0.94] = 0
    weight[0, :9] = 1  # too many neighbours for kernels that pick
    made = lowered(replace(model, params={**model.params, HEAD: weight}), target)
    (layer,) = made.sparse
    assert (layer.kernel, layer.taken) == (kernel, True)
    lists = [n for n in made.kernels if n.startswith("linear_int8") and f"_{kernel}_" in n]
    assert lists and all(int(n.split("_m")[1].split("_")[0]) >= 16 for n in lists)
    turned = "turn_bytes_" if kernel == "free" else "turn_rows_"
    assert any(n.startswith(turned) for n in made.kernels)


@pytest.mark.parametrize(("target", "turned"), [("x86-64-v3", False), ("cortex-a78", True)])
def test_blocks_meet_turned_rows_where_that_gains_with_the_weights_of_few_rows(
    target: str, turned: bool
) -> None:
    made = lowered(with_zeros(0.9, HEAD), target)
    blocks_of = {name: "_turned_" in name for name in made.kernels if "_blocks_" in name}
    rows = {name: int(name.split("_m")[1].split("_")[0]) for name in blocks_of}
    assert all(is_turned == (turned and rows[name] >= 16) for name, is_turned in blocks_of.items())
    assert len(blocks_of) > 1 and any(blocks_of.values()) == turned
    stored = {name.split("@")[1].split(".")[0] for name in made.weights if name.startswith(HEAD)}
    assert len(stored) == 1, "every number of rows reads the same lists"


@pytest.mark.slow
def test_columns_are_taken_by_every_number_of_rows_on_riscv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(columns, "relative_time", lambda shape, isa, density: density)
    model = decoder("int8", layers=1)
    weight = model.params[DOWN].copy()
    zero = np.random.default_rng(0).random((len(weight) // 16, weight.shape[1])) < 0.5
    weight[np.repeat(zero, 16, axis=0)] = 0
    model = replace(model, params={**model.params, DOWN: weight})
    made = lower_kernels(fuse(model, chunks=(1, 16, 32)), Target.load("riscv64-rvv"))
    (layer,) = made.sparse
    turned = {"_turned_" in name for name in made.kernels if "_columns_" in name}
    assert turned == {False, True} and any(n.startswith("turn_columns_") for n in made.kernels)
    assert (layer.kernel, layer.taken) == ("columns", True) and 0.4 < layer.density < 0.6
    assert layer.bytes_left < 0.7
    stored = {name.split("@")[1].split(".")[0] for name in made.weights if name.startswith(DOWN)}
    assert len(stored) == 1, "every number of rows reads the same lists"
    assert not any("_columns_" in name for name in lowered(model, "cortex-a78").kernels)


def test_what_serves_one_row_too_comes_before_what_does_not() -> None:
    (layer,) = lowered(with_zeros(0.9, HEAD)).sparse
    assert layer.kernel == "blocks"
    (layer,) = lowered(with_zeros(0.9, HEAD), sparse="rows").sparse
    assert (layer.kernel, layer.taken) == ("rows", True)
