"""The kernel that does several nodes in one launch: between them its blocks meet."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from slmtvm.codegen.cuda.nodes import Node, single
from slmtvm.codegen.cuda.nvrtc import is_installed
from slmtvm.codegen.cuda.text import PERSISTENT, module_text
from slmtvm.codegen.cuda.translate import translate
from slmtvm.plan.model import Ref, Space
from slmtvm.schedules import vector as vec
from slmtvm.schedules.kernel import Tensor, define
from tests.emulation.cuda.emulator import ORDERS, build_ptx, build_text

pytestmark = pytest.mark.slow

BLOCKS, NODES, SIZE = 9, 4, 9 * 16
BARRIER = "if (i) slm_meet_grid(arrived, passed += gridDim.x);"


def shift() -> Node:
    """A block of the result is the next block, plus one."""

    def body(block: Any, x: Any, y: Any) -> None:
        after = T.bind((block + 1) % BLOCKS * 16)
        vec.store(y, block * 16, T.bind(vec.load(x, after) + vec.splat(1.0)))

    tensors = [Tensor(name, (SIZE,), "float32") for name in "xy"]
    kernel = define("shift", tensors, body, grid=BLOCKS, outputs=["y"])
    return single(translate("shift", kernel.func, (), False), [Ref(Space.ARENA, 0, 0)] * 2, BLOCKS)


def run(library: Path, order: int, launches: int) -> tuple[str | None, np.ndarray]:
    """What the emulator found wrong, and the last result, of 3 blocks of 2 teams."""
    code = ctypes.CDLL(str(library))
    code.emu_order(order)
    function = getattr(code, f"emu_{PERSISTENT}")
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_uint] * 2 + [
        ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    data = np.zeros((NODES + 1, SIZE), np.float32)
    data[0] = np.arange(SIZE)
    places = [data[i + k].ctypes.data for i in range(NODES) for k in range(2)]
    pointers = np.array(places, np.uint64)
    work = np.array([[0, BLOCKS, 2 * i] for i in range(NODES)], np.int32)
    arrived, ambient = np.zeros(1, np.uint32), np.zeros(2, np.int32)
    wrong = None
    for done in range(launches):
        passed = done * 3 * (NODES - 1)
        values: list[Any] = [
            ctypes.c_void_p(a.ctypes.data) for a in (work, pointers, arrived, ambient)
        ]
        values += [ctypes.c_int(NODES), ctypes.c_uint(passed)]
        params = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values)
        )
        data[1:] = -1
        wrong = wrong or function(3, 32, 0, params)
    return wrong.decode() if wrong else None, data[-1]


WANT = np.roll(np.arange(SIZE, dtype=np.float32), -16 * NODES) + NODES


@pytest.mark.parametrize("make", [build_text, build_ptx])
def test_every_order_of_threads_gives_the_same_launch_after_launch(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    if make is build_ptx and not is_installed(12):
        pytest.skip("NVRTC is not installed: pip install 'slmtvm[cuda]'")
    node = shift()
    library = make(module_text([], [node]), [PERSISTENT], tmp_path)
    for order in ORDERS:
        wrong, got = run(library, order, launches=2)
        assert wrong is None
        assert np.array_equal(got, WANT), order


@pytest.mark.parametrize("instead", ["", "if (i && blockIdx.x) __syncthreads();"])
def test_the_emulator_finds_a_missing_barrier(instead: str, tmp_path: Path) -> None:
    text = module_text([], [shift()])
    assert BARRIER in text
    library = build_text(text.replace(BARRIER, instead), [PERSISTENT], tmp_path)
    assert any(not np.array_equal(run(library, order, 1)[1], WANT) for order in ORDERS)


def test_the_emulator_finds_a_block_that_does_not_come(tmp_path: Path) -> None:
    text = module_text([], [shift()]).replace(BARRIER, f"if (blockIdx.x) {{ {BARRIER} }}")
    wrong, _ = run(build_text(text, [PERSISTENT], tmp_path), ORDERS[0], 1)
    assert wrong == "threads wait for one another"
