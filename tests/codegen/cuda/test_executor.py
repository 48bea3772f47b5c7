"""A bundle's GPU library, with a driver that runs its kernels on this machine: the CPU's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.codegen.cuda.launches import schedule
from slmtvm.codegen.cuda.nvrtc import is_installed
from slmtvm.codegen.cuda.text import PERSISTENT
from slmtvm.codegen.library import build_library
from slmtvm.codegen.weights import merge_weights
from slmtvm.compiler import plan_model
from slmtvm.plan.model import Plan
from slmtvm.target import Target, known_targets
from tests.codegen.elf import Elf
from tests.emulation.cuda.emulator import build, build_driver, build_text
from tests.emulation.session import open_sessions
from tests.models import model_path
from tests.models.corpus import corpus_path
from tests.models.pycode import ROOT
from tests.runtime.toy import (
    VOCAB,
    decoder_reference,
    encoder_reference,
    toy_decoder,
    toy_encoder,
    toy_weights,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_installed(12),
        reason="NVRTC is not installed: pip install 'slmtvm[cuda]'",
    ),
]

GPU, CPU = "cuda-sm90", "x86-64-v3"
TOKENS = [str(t) for t in np.random.default_rng(5).integers(0, VOCAB, 19)]


@dataclass(frozen=True)
class Machine:
    """A bundle for a GPU and a CPU, and an emulated GPU."""

    bundle: Path
    driver: Path
    kernels: Path

    def run(
        self, target: str, output: Path, *, gpu: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        module = ["-m", "tests.codegen.cuda.generate"]
        return self.start(
            [*module, str(self.bundle), target, str(output), *TOKENS], gpu=gpu, **environment
        )

    def start(
        self, command: list[str], *, gpu: bool = True, program: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A Python ``program`` or another command, with the emulated GPU's driver where there is to
        be one."""
        found = {"LD_LIBRARY_PATH": str(self.driver.parent), "EMULATED_KERNELS": str(self.kernels)}
        return subprocess.run(
            [*([sys.executable] if program else []), *command],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(found if gpu else {}), **environment},
        )  # fmt: skip


def make_machine(folder: Path, plans: list[Plan]) -> Machine:
    """A bundle of a GPU's plan, with the persistent kernel, and a CPU's."""
    gpu, cpu = Target.load(GPU).with_persistent_kernel(), Target.load(CPU)
    assert gpu.cuda is not None
    made = schedule(plans[0], gpu.cuda)
    kernels = build(made.nodes, folder, made.persistent)
    bundle = folder / "model.slm"
    write_bundle(bundle, list(zip((gpu, cpu), plans, strict=True)))
    return Machine(bundle, build_driver(folder), kernels)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return make_machine(tmp_path_factory.mktemp("toy"), [toy_decoder(mask="keys")] * 2)


def logits(machine: Machine, target: str, path: Path, **environment: str) -> dict[str, np.ndarray]:
    done = machine.run(target, path, **environment)
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, expected in want.items():
        assert np.array_equal(got[name].view(np.uint32), expected.view(np.uint32)), name


WAYS = ("", "graph", "direct")
"""Of SLM_CUDA_LAUNCH: a persistent kernel for a decoded token, graphs, kernels one by one."""


@pytest.mark.parametrize("way", WAYS)
def test_sessions_positions_and_masks_are_those_of_the_cpu(
    way: str, toy: Machine, tmp_path: Path
) -> None:
    got = logits(toy, GPU, tmp_path / "gpu.npz", SLM_CUDA_LAUNCH=way)
    assert_same_bits(got, logits(toy, CPU, tmp_path / "cpu.npz"))
    tokens = [int(t) for t in TOKENS]
    want = decoder_reference(tokens, toy_weights())
    assert np.array_equal(got["prompt"], want[-1])
    assert np.array_equal(got["all"], want[-3:])


def planted(toy: Machine, folder: Path, right: str, wrong: str) -> Machine:
    """A GPU whose kernels have something ``wrong`` in their text."""
    gpu = Target.load(GPU).with_persistent_kernel()
    assert gpu.cuda is not None
    made = schedule(toy_decoder(mask="keys"), gpu.cuda)
    assert right in made.text
    names = [*(node.name for node in made.nodes), PERSISTENT]
    return replace(toy, kernels=build_text(made.text.replace(right, wrong), names, folder))


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.exhaustive if w else ()) for w in WAYS]
)
def test_the_likeliest_token_is_what_the_gpu_found(way: str, toy: Machine, tmp_path: Path) -> None:
    want = logits(toy, CPU, tmp_path / "cpu.npz")
    next_one = planted(toy, tmp_path, "chosen[1] = ", "chosen[1] = 1 + ")
    got = logits(next_one, GPU, tmp_path / "gpu.npz", SLM_CUDA_LAUNCH=way)
    # Of the prompt's logits; what follows continues another text.
    assert got["tokens"][0] == want["tokens"][0] + 1
    assert got["tokens"][-1] == want["tokens"][-1] + 1
    assert_same_bits({**got, "tokens": want["tokens"]}, want)


def test_logits_that_are_no_numbers_are_an_error_where_the_gpu_finds_them(
    toy: Machine, tmp_path: Path
) -> None:
    none = planted(toy, tmp_path, "chosen[0] = ", "chosen[0] = slm_float(0x7fc00000) + ")
    done = none.run(GPU, tmp_path / "gpu.npz")
    assert done.returncode == 1
    assert "the logits are not finite numbers" in done.stderr


@pytest.mark.parametrize("cooperative", ["0", "1"])
def test_a_gpu_that_cannot_hold_all_blocks_at_once_runs_the_graphs(
    cooperative: str, toy: Machine, tmp_path: Path
) -> None:
    failing = "cuLaunchCooperativeKernel:1"
    done = toy.run(
        GPU, tmp_path / "gpu.npz", EMULATED_COOPERATIVE=cooperative, EMULATED_FAIL=failing
    )
    assert done.returncode == int(cooperative)


RUNS = [("12345", ""), ("12345", "graph"), ("0", ""), ("1", "")]


@pytest.mark.parametrize(
    ("order", "way"),
    [pytest.param(*r, marks=pytest.mark.exhaustive if r != RUNS[0] else ()) for r in RUNS],
)
def test_logits_of_the_demo_model_have_the_bits_of_the_cpu(
    order: str, way: str, tmp_path: Path
) -> None:
    plans = [plan_model(model_path("int4"), Target.load(t), context=48) for t in (GPU, CPU)]
    machine = make_machine(tmp_path, plans)
    given = {"EMULATED_ORDER": order, "SLM_CUDA_LAUNCH": way}
    got = logits(machine, GPU, tmp_path / "gpu.npz", **given)
    assert_same_bits(got, logits(machine, CPU, tmp_path / "cpu.npz"))


def test_an_encoder_computes_what_the_cpu_computes(tmp_path: Path) -> None:
    machine = make_machine(tmp_path, [toy_encoder(mask="keys")] * 2)
    got = logits(machine, GPU, tmp_path / "gpu.npz")
    assert_same_bits(got, logits(machine, CPU, tmp_path / "cpu.npz"))
    want = encoder_reference([int(t) for t in TOKENS], toy_weights())
    assert np.array_equal(got["all"], want)


CORPUS = (
    "gemma2-optimum-past/model.onnx",  # operators that are no kernels, capped scores
    "minilm-script/model.onnx",
    "mistral-builder-int4/model.onnx",  # windows
    "mixtral-script-masked/model.onnx",  # experts
    "t5-optimum/decoder_model.onnx",
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", CORPUS)
def test_a_model_of_the_corpus_has_the_bits_of_the_cpu(file: str, tmp_path: Path) -> None:
    path = corpus_path(*file.split("/"))
    plans = [plan_model(path, Target.load(target), context=32) for target in (GPU, CPU)]
    machine = make_machine(tmp_path, plans)
    got = logits(machine, GPU, tmp_path / "gpu.npz", EMULATED_ORDER="1")
    assert_same_bits(got, logits(machine, CPU, tmp_path / "cpu.npz"))


SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  [ "$1" = --error-exitcode ] && code=$2
  [ "$1" = --tool ] && tool=$2
  shift 2
done
[ "$tool" = synccheck ] && exit $code
exec "$@"
"""
"""Starts what it is given, and says of one tool that it found something."""


@pytest.mark.exhaustive
def test_the_script_that_checks_a_gpu_finds_what_there_is(toy: Machine, tmp_path: Path) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(SANITIZER)
    sanitizer.chmod(0o755)
    script = [
        str(ROOT / "scripts" / "check_cuda.sh"),
        str(toy.bundle),
        str(tmp_path / "report"),
        "3",
    ]
    given = {"COMPUTE_SANITIZER": str(sanitizer), "PYTHON": sys.executable}
    done = toy.start(script, program=False, **given)
    report = json.loads((tmp_path / "report" / "check.json").read_text())
    assert report["targets"] == [GPU, CPU] and report["gpu"]["name"] == "emulated"
    ways = ("as compiled", "graph", "direct")
    assert report["differing_logits"] == {way: {"prompt": 0, "decode": 0} for way in ways}
    assert done.stdout.splitlines() == [
        "bits and times: passed",
        *(
            f"{t}, {w}: passed"
            for t in ("memcheck", "racecheck")
            for w in ("as compiled", "direct")
        ),
        *(f"synccheck, {w}: FAILED with 9" for w in ("as compiled", "direct")),
    ]
    assert done.returncode == 1


def test_a_check_without_nvidias_tools_says_what_is_left_out(toy: Machine, tmp_path: Path) -> None:
    script = [
        str(ROOT / "scripts" / "check_cuda.sh"),
        str(toy.bundle),
        str(tmp_path / "report"),
        "3",
    ]
    done = toy.start(script, program=False, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memcheck: left out, there is no compute-sanitizer here" in done.stdout
    bundle = tmp_path / "cpu.slm"
    write_bundle(bundle, [(Target.load(CPU), toy_decoder())])
    done = toy.start(["scripts/check_cuda.py", str(bundle)])
    assert done.returncode == 2
    assert "needs libraries for a GPU and for this CPU" in done.stderr


REFUSED = [
    ("cuInit:1", "starting the CUDA driver: CUDA_ERROR_NO_DEVICE"),
    ("cuDevicePrimaryCtxRetain:1", "opening the GPU"),
    ("cuModuleLoadData:1", "loading kernels: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuModuleGetFunction:3", "finding a kernel: CUDA_ERROR_NOT_FOUND"),
    ("cuMemAlloc_v2:1", "memory for weights: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuMemAlloc_v2:2", "memory for a session: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuMemHostAlloc:2", "memory for outputs: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuMemAlloc_v2:6", "memory for a session: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuOccupancyMaxActiveBlocksPerMultiprocessor:1", "looking at the GPU"),
    ("cuLaunchCooperativeKernel:2", "running kernels: CUDA_ERROR_LAUNCH_FAILED"),
    ("cuGraphInstantiateWithFlags:2", "preparing a step: CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuGraphLaunch:3", "running kernels: CUDA_ERROR_LAUNCH_FAILED"),
    ("cuStreamSynchronize:3", "copying tables: CUDA_ERROR_LAUNCH_FAILED"),
    ("cuStreamSynchronize:7", "running kernels: CUDA_ERROR_LAUNCH_FAILED"),
    ("cuMemcpyDtoDAsync_v2:1", "moving rows: CUDA_ERROR_INVALID_VALUE"),
]
_EXEMPLARS = ("cuInit:1", "cuMemAlloc_v2:2", "cuLaunchCooperativeKernel:2")


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        pytest.param(f, w, marks=[] if f in _EXEMPLARS else pytest.mark.exhaustive)
        for f, w in REFUSED
    ],
)
def test_what_the_driver_refuses_is_an_error(
    failing: str, words: str, toy: Machine, tmp_path: Path
) -> None:
    done = toy.run(GPU, tmp_path / "gpu.npz", EMULATED_FAIL=failing)
    assert done.returncode == 1
    assert words in done.stderr and "DeviceError" in done.stderr


@pytest.mark.parametrize("name", known_targets(cuda=True))
def test_a_library_needs_no_cuda_to_be_loaded_and_exports_only_its_interface(
    name: str, tmp_path: Path
) -> None:
    target = Target.load(name)
    assert target.cuda is not None
    if not is_installed(target.cuda.release):
        pytest.skip(f"NVRTC {target.cuda.release} is not installed: see docs/jetson.md")
    weights, (plan,) = merge_weights([toy_decoder()])
    build_library(plan, target, tmp_path / "gpu.so", weights)
    build_library(plan, Target.load(CPU), tmp_path / "cpu.so", weights)
    library, cpu = (Elf((tmp_path / file).read_bytes()) for file in ("gpu.so", "cpu.so"))
    assert library.machine == {"x86_64": 62, "aarch64": 183}[target.arch]
    assert set(library.needed) <= {"libc.so.6", "libm.so.6", "libdl.so.2"}
    assert library.exports == cpu.exports


def test_a_driver_that_is_too_old_is_named(toy: Machine, tmp_path: Path) -> None:
    driver = build_driver(tmp_path, lacking="cuGraphInstantiateWithFlags")
    done = replace(toy, driver=driver).run(GPU, tmp_path / "gpu.npz")
    assert done.returncode == 1
    assert "the CUDA driver lacks cuGraphInstantiateWithFlags: it is older than 11.4" in done.stderr


def test_a_gpu_of_another_generation_is_named(toy: Machine, tmp_path: Path) -> None:
    done = toy.run("best", tmp_path / "gpu.npz", EMULATED_ARCH="87")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CPU} loading kernels: this GPU is an sm_87, the kernels are")
    done = toy.run(GPU, tmp_path / "gpu.npz", EMULATED_ARCH="87")
    assert "this GPU is an sm_87, the kernels are for sm_90" in done.stderr
    assert "DeviceError" in done.stderr
    # A later one's driver compiles the PTX.
    assert toy.run("best", tmp_path / "gpu.npz", EMULATED_ARCH="100").stdout.split() == [GPU, "-"]


@pytest.mark.parametrize("way", WAYS)
def test_a_fault_in_a_kernel_is_an_error_and_the_process_lives(
    way: str, toy: Machine, tmp_path: Path
) -> None:
    given = {"SLM_CUDA_LAUNCH": way, "EMULATED_FAULT": "2"}
    done = toy.run("lives", tmp_path / "got.npz", **given)
    assert done.returncode == 0, done.stderr
    words = "CUDA_ERROR_ILLEGAL_ADDRESS (700)"  # which stays, whatever is asked for
    assert done.stdout.splitlines() == [
        GPU, f"DeviceError: running kernels: {words}", f"DeviceError: using the GPU: {words}",
        f"{CPU} -",
    ]  # fmt: skip
    assert_same_bits(dict(np.load(tmp_path / "got.npz")), logits(toy, CPU, tmp_path / "cpu.npz"))


def test_without_a_driver_the_error_says_so(toy: Machine, tmp_path: Path) -> None:
    done = toy.run(GPU, tmp_path / "gpu.npz", gpu=False)
    assert done.returncode == 1
    assert "DeviceError" in done.stderr and "no CUDA driver here: libcuda.so.1" in done.stderr


def test_where_the_gpu_fails_the_cpu_runs_and_says_why(toy: Machine, tmp_path: Path) -> None:
    path = tmp_path / "got.npz"
    done = toy.run("best", path, EMULATED_FAIL="cuDeviceGet:1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CPU} finding a GPU: CUDA_ERROR_NO_DEVICE (100)")
    assert toy.run("best", path).stdout.split() == [GPU, "-"]
    assert toy.run("best", path, gpu=False).stdout.split() == [CPU, "-"]


def test_where_bench_finds_the_cpu_faster_the_cpu_runs_and_says_why(
    toy: Machine, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in toy.bundle.rglob("*") if path.is_file()}
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    done = toy.start(["-m", "tests.codegen.cuda.measure", str(toy.bundle)], **cache)
    assert done.returncode == 0, done.stderr
    why = f"bench found {CPU} faster here: "  # an emulated GPU is no fast one
    assert why in done.stdout
    for target, said in (("best", f"{CPU} {why}"), (GPU, f"{GPU} -")):  # the latter as asked for
        done = toy.run(target, tmp_path / "got.npz", **cache)
        assert done.returncode == 0 and done.stdout.startswith(said), done.stderr
    assert before == {p: p.read_bytes() for p in toy.bundle.rglob("*") if p.is_file()}


@pytest.mark.exhaustive
def test_bench_keeps_nothing_where_there_is_no_gpu_to_compare_with(
    toy: Machine, tmp_path: Path
) -> None:
    measure = ["-m", "tests.codegen.cuda.measure", str(toy.bundle)]
    given = {"EMULATED_FAIL": "cuDeviceGet:1", "XDG_CACHE_HOME": str(tmp_path)}
    done = toy.start(measure, **given)
    assert done.returncode == 0, done.stderr
    assert CPU in done.stdout and "bench found" not in done.stdout
    assert not (tmp_path / "slmtvm" / "fastest").exists()


def test_a_failed_call_leaves_the_session_as_it_was(toy: Machine, tmp_path: Path) -> None:
    done = toy.run("again", tmp_path / "got.npz", EMULATED_FAIL="cuGraphLaunch:4")
    assert done.returncode == 0, done.stderr
    assert "running kernels" in done.stdout
    assert_same_bits(dict(np.load(tmp_path / "got.npz")), logits(toy, CPU, tmp_path / "cpu.npz"))


@pytest.mark.exhaustive
def test_the_library_of_a_jetson_has_the_bits_of_its_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Target.load("jetson-orin").with_persistent_kernel()
    assert gpu.cuda is not None
    cpu = Target.load(gpu.cuda.fallback)
    path = corpus_path("mistral-builder-int4", "model.onnx")
    plans = [plan_model(path, target, context=32) for target in (gpu, cpu)]
    bundle = tmp_path / "model.slm"
    write_bundle(bundle, list(zip((gpu, cpu), plans, strict=True)))
    of_gpu, of_cpu = (open_sessions(bundle, t, tmp_path)[0] for t in (gpu, cpu))
    made = schedule(plans[0], gpu.cuda)
    kernels = build(made.nodes, tmp_path, made.persistent, gpu.link)
    # The emulated machine's: qemu itself is linked to nothing.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build_driver(tmp_path, gpu.link).parent))
    monkeypatch.setenv("EMULATED_KERNELS", str(kernels))
    tokens = np.random.default_rng(3).integers(0, plans[0].vocab_size, 9)
    got, want = (s.eval_all(tokens, len(tokens)) for s in (of_gpu, of_cpu))
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    assert of_gpu.greedy(tokens, 3) == of_cpu.greedy(tokens, 3)
