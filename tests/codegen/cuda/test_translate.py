"""The text of a kernel: where its threads wait for one another, and what has no text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tvm import te, tirx, topi
from tvm.script.ir_builder import tirx as T

from slmtvm.codegen.cuda.launches import launch
from slmtvm.codegen.cuda.text import translate_plan
from slmtvm.codegen.cuda.translate import CudaKernel, translate
from slmtvm.errors import UnsupportedOpError
from slmtvm.plan.model import Function, KernelCode, Plan, PlanOutput, Ref, Space, Step
from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Kernel, Tensor, define
from slmtvm.target import CudaTarget

GPU = CudaTarget("sm_87", 8, "cortex-a78")


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
    assert "block < 72;" in made.text and "y[block] = " in made.text


def test_a_sum_over_an_operators_loop_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"loops? that TVM made of a graph's operator"):
        translate("k", operator("sum"), (), False)


@pytest.mark.parametrize(
    ("grid", "team_bytes", "blocks", "teams"),
    [(1, 0, 1, 2), (18, 0, 5, 4), (100, 0, 7, 16), (9999, 0, 32, 16), (100, 9000, 25, 4)],
)
def test_a_grid_is_spread_over_all_multiprocessors_that_have_room(
    grid: int, team_bytes: int, blocks: int, teams: int
) -> None:
    made = launch(CudaKernel("k", "", 1, team_bytes), grid, GPU)
    assert (made.blocks, made.teams) == (blocks, teams)
    assert made.shared_bytes == teams * team_bytes


def test_more_shared_memory_than_there_is_is_an_error() -> None:
    with pytest.raises(UnsupportedOpError, match="needs 50,000 bytes of shared memory"):
        launch(CudaKernel("k", "", 1, 50_000), 4, GPU)
