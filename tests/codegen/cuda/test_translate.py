"""The text of a kernel: where its threads wait for one another, and what has no text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tvm import te, tirx, topi
from tvm.script.ir_builder import tirx as T

from slmtvm.codegen.cuda.launches import launch, schedule
from slmtvm.codegen.cuda.nodes import Node, Part, nodes_of, single
from slmtvm.codegen.cuda.text import module_text, translate_plan
from slmtvm.codegen.cuda.translate import CudaKernel, translate
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import Function, KernelCode, Plan, PlanOutput, Ref, Space, Step
from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.target import CudaTarget

GPU = CudaTarget("sm_87", 8, "cortex-a78", 102.4)


def kernel(body: Callable[..., None]) -> Kernel:
    tensors = [Tensor("x", (64,), "float32"), Tensor("y", (64,), "float32")]
    return define("k", tensors, body, grid=1, outputs=["y"])


def text_of(body: Callable[..., None]) -> str:
    return translate("k", kernel(body).func, (), False).text


def waits(body: Callable[..., None]) -> int:
    return text_of(body).count("slm_sync(t);")


def operator(name: str) -> Any:
    """What TVM makes of an operator on a row of 72."""
    x = te.placeholder((1, 72), name="x")
    y = x * te.const(8.5, "float32") if name == "multiply" else topi.sum(x, axis=1)
    made = te.create_prim_func([x, y])
    scalars = [tirx.Var(n, "int32") for n in ("begin", "end")]
    return tirx.PrimFunc([*made.params, *scalars], made.body, made.ret_type, made.attrs)


def copy(block: Any, x: Any, y: Any) -> None:
    vec.store(y, T.int32(0), vec.load(x, T.int32(0)))


def copy_and_read_back(block: Any, x: Any, y: Any) -> None:
    copy(block, x, y)
    vec.store(y, T.int32(16), vec.load(y, T.int32(8)))


def copy_round_by_round(block: Any, x: Any, y: Any) -> None:
    with T.serial(0, 3) as i:
        vec.store(y, T.bind(i * 16 + 16), vec.load(y, T.bind(i * 16)))


def test_what_nobody_reads_back_needs_one_wait_between_a_teams_blocks() -> None:
    assert waits(copy) == 1


def test_what_another_thread_wrote_is_waited_for() -> None:
    # Before the first store (of an earlier block), the load, and the store over what was read.
    assert waits(copy_and_read_back) == 3


def test_what_an_earlier_round_of_a_loop_wrote_is_waited_for() -> None:
    text = text_of(copy_round_by_round)
    loop = text[text.index("for (int i") :]
    assert loop.index("slm_sync(t);") < loop.index("y[")


def test_an_array_of_constant_places_is_registers_and_any_other_is_shared_memory() -> None:
    def body(block: Any, x: Any, y: Any) -> None:
        sums = vec.Accumulators(2)
        sums[1] = vec.load(x, T.int32(0))
        staged = T.alloc_buffer((20,), "float32", scope="local")
        vec.store(staged, T.int32(0), sums[1])
        with T.serial(0, 5) as i:
            vec.store(y, i, vec.load(staged, i, 1), 1)

    made = translate("k", kernel(body).func, (), False)
    assert made.team_bytes == 80
    assert made.text.count("t.memory") == 1


def test_a_kernel_without_text_is_named() -> None:
    def body(block: Any, x: Any, y: Any) -> None:
        T.buffer_store(y, T.sin(x[0]), [0])

    refs = (Ref(Space.TOKENS, 0, 4), Ref(Space.OUTPUT, 0, 256))
    function = Function("body", 1, (Step("waves", refs, 1),))
    plan = Plan(
        "encoder", (function,), {"waves": KernelCode(kernel(body).func, 2, ())}, (), 1, 1, 2,
        (PlanOutput("", 64),), Ref(Space.OUTPUT, 0, 0), 64, 0, 0, 0, 0,
    )  # fmt: skip
    message = r"kernel waves: a kernel has tirx\.sin, which has no CUDA text; compile the model for"
    with pytest.raises(UnsupportedOpError, match=message):
        translate_plan(plan)


def test_each_round_of_an_operators_loop_is_a_block() -> None:
    made = translate("k", operator("multiply"), (), False)
    assert made.grid == 72
    text = module_text([single(made, [A, RESULT], 1)])
    assert "block < 72;" in text and "y[block] = " in text


def test_a_sum_over_an_operators_loop_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"loops? that TVM made of a graph's operator"):
        translate("k", operator("sum"), (), False)


def node(grid: int, team_bytes: int, between: int = 0) -> Node:
    part = Part(CudaKernel("k", "", (), team_bytes), (), None)
    return Node("node_k", (part,), (), grid, between)


@pytest.mark.parametrize(
    ("grid", "team_bytes", "blocks", "teams"),
    [(1, 0, 1, 2), (18, 0, 5, 4), (100, 0, 7, 16), (9999, 0, 32, 16), (100, 9000, 25, 4)],
)
def test_a_grid_is_spread_over_all_multiprocessors_that_have_room(
    grid: int, team_bytes: int, blocks: int, teams: int
) -> None:
    made = launch(node(grid, team_bytes, between=64), GPU)
    assert (made.blocks, made.teams) == (blocks, teams)
    assert made.shared_bytes == 64 + teams * team_bytes


def test_more_shared_memory_than_there_is_is_an_error() -> None:
    given = {"k": CudaKernel("kernel_k", "", (), 50_000)}
    function = Function("body", 1, (Step("k", (), 4),))
    plan = steps_on({"k": kernel(copy)}, [])
    with pytest.raises(UnsupportedOpError, match="needs 50,000 bytes of shared memory"):
        nodes_of(plan, function, given)


def steps_on(kernels: dict[str, Kernel], steps: list[Step], rows: int = 1) -> Plan:
    codes = {
        name: KernelCode(k.func, len(k.tensors), k.scalars, runs=k.runs)
        for name, k in kernels.items()
    }
    function = Function("body", rows, tuple(steps))
    return Plan(
        "encoder", (function,), codes, (), 1, 1, 2, (PlanOutput("", 64),),
        Ref(Space.ARENA, 0, 0), 64, 256, 4096, 0, 0,
    )  # fmt: skip


def place(offset: int, space: Space = Space.ARENA, size: int = 256) -> Ref:
    return Ref(space, offset, size)


A, B, C, D = (place(i * 256) for i in range(4))
RESULT, KEPT = place(0, Space.OUTPUT), place(0, Space.STATE)  # no small step's
JOINED = [
    ("a chain", [(A, B), (B, C), (C, RESULT)], 1, [3]),
    ("what two read", [(A, B), (B, C), (B, RESULT)], 1, [3]),
    ("what others read, too", [(A, B), (B, KEPT), (B, RESULT)], 1, [1, 1, 1]),
    ("what the last step writes over", [(A, B), (B, A), (A, KEPT), (A, RESULT)], 1, [1] * 4),
    ("the place of what is done with", [(A, B), (B, C), (C, B), (B, RESULT)], 1, [1, 3]),
    ("several rows", [(A, B), (B, RESULT)], 16, [1, 1]),
]


@pytest.mark.parametrize(("steps", "rows", "sizes"), [j[1:] for j in JOINED],
                         ids=[j[0] for j in JOINED])  # fmt: skip
def test_small_steps_join_the_one_that_alone_reads_what_they_make(
    steps: list[tuple[Ref, Ref]], rows: int, sizes: list[int]
) -> None:
    plan = steps_on({"k": kernel(copy)}, [Step("k", refs, 1) for refs in steps], rows)
    ((_, nodes),) = schedule(plan, GPU).functions
    assert [len(n.parts) for n in nodes] == sizes
    assert nodes[-1].refs[-1] == RESULT
    inside = [a for n in nodes for p in n.parts[:-1] for a in p.arguments[1:]]
    assert all(a < 0 for a in inside)  # what small steps make lies in shared memory


@pytest.mark.parametrize(("places", "shared"), [((A, B, RESULT), True), ((A, B, A), False)])
def test_steps_of_equal_runs_are_one_launch_of_a_block_of_threads_for_each_run(
    places: tuple[Ref, Ref, Ref], shared: bool
) -> None:
    steps = [Step("k", places[:2], 8), Step("k", places[1:], 8)]
    plan = steps_on({"k": replace(kernel(copy), runs=4)}, steps)
    made = schedule(plan, GPU)
    ((_, nodes),) = made.functions
    if not shared:  # the first would read what a block that is ahead has written over
        assert [n.runs for n in nodes] == [1, 1]
        return
    (one,) = nodes
    assert (one.runs, [p.grid for p in one.parts]) == (4, [2, 2])
    assert launch(one, GPU).blocks == 4
    assert made.text.count("run * 2 + i") == len(one.parts)
