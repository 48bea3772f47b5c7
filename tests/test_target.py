"""Targets: the files that come with slmtvm, one's own files, and the machine at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmtvm.errors import TargetError
from slmtvm.host import cpu_features
from slmtvm.schedules import isa
from slmtvm.target import Target, host_target, known_targets

_V3 = "sse4_2 popcnt movbe abm bmi1 bmi2 f16c fma avx2"
ICE_LAKE = f"flags : fpu {_V3} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni\n"
HASWELL = f"flags : fpu {_V3}\n"
NEHALEM = "flags : fpu sse4_2\n"
CORTEX_A78 = "Features : fp asimd evtstrm aes asimdhp asimddp\n"
CORTEX_A72 = "Features : fp asimd evtstrm\n"
RISCV_VECTOR = "isa : rv64imafdcv_zicsr_zifencei\n"
RISCV_SCALAR = "isa : rv64imafdc_zicsr\n"


@pytest.mark.parametrize("name", [*known_targets(), *known_targets(cuda=True)])
def test_each_target_file_is_named_after_its_target_and_uses_a_known_isa(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert isa.get(target.isa).name == target.isa
    assert target.tvm.kind.name == "llvm"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "name"),
    [
        ("x86_64", ICE_LAKE, "x86-64-v4-vnni"),
        ("x86_64", HASWELL, "x86-64-v3"),
        ("aarch64", CORTEX_A78, "cortex-a78"),
        ("aarch64", CORTEX_A72, "cortex-a72"),
        ("riscv64", RISCV_VECTOR, "riscv64-rvv"),
    ],
)
def test_the_host_is_the_best_target_whose_features_the_cpu_has(
    machine: str, cpuinfo: str, name: str
) -> None:
    assert host_target(machine, cpuinfo).name == name


@pytest.mark.parametrize(
    ("machine", "cpuinfo"),
    [("x86_64", NEHALEM), ("riscv64", RISCV_SCALAR), ("s390x", "")],
)
def test_a_machine_that_no_target_fits_is_refused(machine: str, cpuinfo: str) -> None:
    with pytest.raises(TargetError, match=machine):
        host_target(machine, cpuinfo)


def test_extensions_of_a_riscv_isa_string_are_not_taken_for_single_letters() -> None:
    assert "v" not in cpu_features("isa : rv64imafdc_zve32x_sv39\n")


def test_an_unknown_name_lists_the_known_targets() -> None:
    with pytest.raises(TargetError, match="cortex-a78"):
        Target.load("cortex-a7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("multiprocessors = 8", 'multiprocessors = "8"'), "must have arch .a string., multi"),
        (("multiprocessors = 8", "multiprocessors = 0"), "must have arch"),
        (('arch = "sm_87"', 'arch = "sm_87"\nsms = 3'), "and nothing else"),
        (('isa = "cuda"', 'isa = "neon"'), "need each other"),
    ],
)
def test_a_gpu_is_described_in_full(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "targets" / "jetson-orin.toml").read_text()
    assert change[0] in text
    path = tmp_path / "board.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(TargetError, match=message):
        Target.load(str(path))


def test_the_library_of_a_cpu_is_there_for_every_gpu() -> None:
    for name in known_targets(cuda=True):
        target = Target.load(name)
        assert target.cuda is not None
        fallback = Target.load(target.cuda.fallback)
        assert fallback.cuda is None and fallback.arch == target.arch


def test_a_file_of_ones_own_describes_a_board(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "targets" / "cortex-a78.toml").read_text()
    path = tmp_path / "board.toml"
    path.write_text(text.replace('name = "cortex-a78"', 'name = "board"'))
    assert Target.load(str(path)).name == "board"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("isa = ", "izza = "), "izza"),
        (('name = "cortex-a78"', "name = "), "not valid TOML"),
        (('arch = "aarch64"', 'arch = "arm"'), "arch"),
        (('requires = ["asimd", "asimddp"]', "requires = 3"), "requires"),
    ],
)
def test_a_wrong_file_is_refused_naming_the_field(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = (Path(__file__).parents[1] / "targets" / "cortex-a78.toml").read_text()
    assert change[0] in text
    path = tmp_path / "board.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(TargetError, match=message) as error:
        Target.load(str(path))
    assert "board.toml" in str(error.value)
