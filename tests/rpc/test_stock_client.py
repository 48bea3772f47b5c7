"""TVM's own client drives the runner: calls, times, copies, and what goes wrong on the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import rpc

from slmtvm.rpc.program import build_program
from slmtvm.schedules import isa as isas
from slmtvm.schedules import linear
from slmtvm.target import Target
from tests.rpc.processes import Runner, Tracker
from tests.schedules.harness import run

X = np.arange(128, dtype=np.float32).reshape(8, 16)
W = np.linspace(-1, 1, 16, dtype=np.float32)


def put(remote: Any, *arrays: np.ndarray) -> list[Any]:
    return [tvm.runtime.tensor(array, remote.cpu()) for array in arrays]


def load(remote: Any, program: Path) -> Any:
    remote.upload(bytearray(program.read_bytes()), "kernels")
    return remote.load_module("kernels")


def test_a_kernel_computes_on_the_device(remote: Any, kernels: Path) -> None:
    module = load(remote, kernels)
    x, w, y = put(remote, X, W, np.zeros_like(X))
    module["add_rows"](x, w, y, 3)
    np.testing.assert_array_equal(y.numpy(), X + np.float32(3) * W)
    np.testing.assert_array_equal(x.numpy(), X)


def test_a_part_of_the_grid_and_several_threads_compute_the_same_rows(
    remote: Any, kernels: Path
) -> None:
    module = load(remote, kernels)
    x, w, y = put(remote, X, W, np.zeros_like(X))
    module["add_rows"](x, w, y, 3, 2, 5)
    assert np.flatnonzero(y.numpy().any(axis=1)).tolist() == [2, 3, 4]
    module["add_rows@3"](x, w, y, 3)
    np.testing.assert_array_equal(y.numpy(), X + np.float32(3) * W)


DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip


def some(dtype: str) -> np.ndarray:
    if hasattr(ml_dtypes, dtype):
        return np.array([0.5, -1, 2, 3], getattr(ml_dtypes, dtype))
    return np.array([True, False, False, True] if dtype == "bool" else [1, 2, 3, 100], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype_go_there_are_computed_on_and_come_back(
    dtype: str, remote: Any, kernels: Path
) -> None:
    given = some(dtype)
    x, y = put(remote, given, np.zeros_like(given))
    load(remote, kernels)["reverse"](x, y, given.itemsize)
    np.testing.assert_array_equal(y.numpy(), given[::-1])
    assert y.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_fill_gives_finite_values_that_differ(dtype: str, remote: Any) -> None:
    (x,) = put(remote, np.zeros(1000, some(dtype).dtype))
    remote.get_function("tvm.contrib.random.random_fill_for_measure")(x)
    values = x.numpy().astype(np.float64)
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > (1 if dtype == "bool" else 8)


def test_buffers_are_copied_on_the_device_and_seen_in_part(remote: Any) -> None:
    x, y = put(remote, X, np.zeros_like(X))
    x.copyto(y)
    np.testing.assert_array_equal(y.numpy(), X)


def test_the_functions_of_a_device_exist(remote: Any) -> None:
    assert remote.cpu().exist
    with pytest.raises(AttributeError, match=r"slm\.nothing"):
        remote.get_function("slm.nothing")


def test_files_go_there_and_come_back_and_are_removed(remote: Any) -> None:
    content = bytes(range(256)) * 100
    remote.upload(bytearray(content), "data.bin")
    assert bytes(remote.download("data.bin")) == content
    remote.remove("data.bin")
    remote.remove("data.bin")
    remote.remove("")
    with pytest.raises(Exception, match="No such file"):
        remote.download("data.bin")


@pytest.mark.parametrize("how", [
    {"number": 3, "repeat": 4},
    {"number": 1, "repeat": 2, "min_repeat_ms": 5},
    {"number": 1, "repeat": 2, "cache_flush_bytes": 1 << 20},
    {"number": 1, "repeat": 2, "f_preproc": "cache_flush_cpu_non_first_arg"},
    {"number": 1, "repeat": 4, "cooldown_interval_ms": 1, "repeats_to_cooldown": 2},
])  # fmt: skip
def test_a_kernel_is_timed_as_often_as_asked_for(
    how: dict[str, Any], remote: Any, kernels: Path
) -> None:
    module = load(remote, kernels)
    x, w, y = put(remote, X, W, np.zeros_like(X))
    result = module.time_evaluator("add_rows", remote.cpu(), **how)(x, w, y, 3)
    assert len(result.results) == how["repeat"]
    assert all(0 < seconds < 1 for seconds in result.results)
    np.testing.assert_array_equal(y.numpy(), X + np.float32(3) * W)


@pytest.mark.parametrize(("name", "said"), [
    ("crash", "crash was ended by SIGSEGV"),
    ("hunger", "hunger was ended by SIGSEGV"),
    ("nothing", "there is no kernel nothing"),
])  # fmt: skip
def test_what_a_kernel_does_wrong_is_one_error_and_changes_no_buffer(
    name: str, said: str, remote: Any, kernels: Path
) -> None:
    module = load(remote, kernels)
    x, w, y = put(remote, X, W, np.zeros_like(X))
    with pytest.raises(Exception, match=said):
        module[name](x)
    np.testing.assert_array_equal(x.numpy(), X)
    module["add_rows"](x, w, y, 1)
    np.testing.assert_array_equal(y.numpy(), X + W)


def test_wrong_arguments_are_errors_and_the_session_goes_on(remote: Any, kernels: Path) -> None:
    module = load(remote, kernels)
    x, w, y = put(remote, X, W, np.zeros_like(X))
    for arguments, said in (
        ((x, w), "takes 3 tensors, not 2"),
        ((x, x, w, 1), "tensor 2 of add_rows takes 512 bytes, not 64"),
        ((x, w, y, 1.5), "tensors first, then integers"),
        ((x, w, y, 1, 0, 9), "no part of the grid"),
        ((x, w, y, 1 << 40), "does not fit into 32 bits"),
    ):
        with pytest.raises(Exception, match=said):
            module["add_rows"](*arguments)
    with pytest.raises(Exception, match="100,000,000,000"):
        tvm.runtime.empty((100_000_000_000,), "uint8", remote.cpu())
    module["add_rows"](x, w, y, 1)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".hidden", "x\n", "", "x" * 300])
def test_an_upload_stays_in_the_folder_of_its_session(name: str, remote: Any) -> None:
    with pytest.raises(Exception, match="is no name for a file of a session"):
        remote.get_function("tvm.rpc.server.upload")(name, b"x")


def test_uploads_are_bounded(remote: Any) -> None:
    upload = remote.get_function("tvm.rpc.server.upload")
    upload("one", bytes(12 << 20))
    upload("one", bytes(12 << 20))
    with pytest.raises(Exception, match="uploads beyond 20,971,520 bytes"):
        upload("two", bytes(12 << 20))


def test_a_module_must_be_an_executable_for_this_machine(remote: Any) -> None:
    remote.upload(bytearray(b"#!/bin/sh\nexit 0\n"), "script")
    with pytest.raises(Exception, match="is not an ELF executable"):
        remote.load_module("script")
    foreign = bytearray(64)
    foreign[:20] = b"\x7fELF\x02\x01" + bytes(12) + (8).to_bytes(2, "little")
    remote.upload(foreign, "foreign")
    with pytest.raises(Exception, match="was built for machine 8; this device is"):
        remote.load_module("foreign")


def test_a_kernel_that_hangs_is_ended_with_its_session_and_the_next_client_is_served(
    tracker: Tracker, runner: Runner, kernels: Path
) -> None:
    client = rpc.connect_tracker("127.0.0.1", tracker.port)
    remote = client.request("test", session_timeout=3)
    module, (x,) = load(remote, kernels), put(remote, X)
    start = time.monotonic()
    with pytest.raises(Exception, match="hang was killed after"):
        module["hang"](x)
    assert time.monotonic() - start < 10
    time.sleep(max(3.2 - (time.monotonic() - start), 0))
    with pytest.raises(Exception, match="time of this session is over"):
        module["crash"](x)
    del module, x, remote
    again = client.request("test", session_timeout=10)
    assert again.cpu().exist
    del again
    client.close()


@pytest.mark.slow
def test_a_real_kernel_gives_the_same_bytes_as_without_a_runner(
    remote: Any, tmp_path: Path
) -> None:
    target = Target.load("host")
    shape = linear.LinearShape(3, 64, 96, "int4", "block", group_size=32)
    kernel = linear.build(shape, isas.get(target.isa))
    rng = np.random.default_rng(0)
    given = {
        t.name: rng.standard_normal(t.shape).astype(t.dtype)
        if "float" in t.dtype
        else rng.integers(0, 100, t.shape).astype(t.dtype)
        for t in kernel.tensors
        if t.name not in kernel.outputs
    }
    expected = run(kernel, given, target)
    build_program({"linear": kernel}, target, tmp_path / "program")
    remote.upload(bytearray((tmp_path / "program").read_bytes()), "program")
    module = remote.load_module("program")
    for name in ("linear", "main", "linear@2"):
        buffers = put(
            remote, *(given.get(t.name, np.zeros(t.shape, t.dtype)) for t in kernel.tensors)
        )
        module[name](*buffers)
        for tensor, buffer in zip(kernel.tensors, buffers, strict=True):
            np.testing.assert_array_equal(buffer.numpy(), expected[tensor.name], tensor.name)
