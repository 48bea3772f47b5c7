"""What a library is from outside: its exports, what it needs, its size, its bytes."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmtvm.codegen import c_runtime
from slmtvm.codegen.library import KNOWN_FEATURES, build_library
from slmtvm.codegen.tables import MAX_ARGS
from slmtvm.codegen.weights import merge_weights
from slmtvm.codegen.zig import zig_cc
from slmtvm.errors import SlmError, TargetError
from slmtvm.plan.model import Space
from slmtvm.runtime.interface import ABI_VERSION, PROTOTYPES
from slmtvm.target import Target, known_targets
from tests.codegen.elf import Elf
from tests.runtime.toy import toy_decoder
from tests.small_disk import small_disk

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"
MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}  # e_machine of the ELF header
MAX_TOY_BYTES = 136 * 1024  # a third turns text into tokens and back, another decrypts and trusts


def build(target: Target, folder: Path) -> Path:
    weights, (plan,) = merge_weights([toy_decoder()])
    path = folder / f"{target.name}.so"
    build_library(plan, target, path, weights)
    return path


@pytest.mark.parametrize("name", known_targets())
def test_a_library_needs_only_libc_and_exports_only_its_interface(
    name: str, tmp_path: Path
) -> None:
    target = Target.load(name)
    path = build(target, tmp_path)
    library = Elf(path.read_bytes())
    header = (RUNTIME / "slm.h").read_text()
    assert library.machine == MACHINES[target.arch]
    assert set(library.needed) <= {"libc.so.6", "libm.so.6"}
    assert library.soname == path.name
    assert library.exports == set(re.findall(r"SLM_API [\w ]*\*?(slm_\w+)\(", header))
    assert not library.has_section(".symtab")
    assert path.stat().st_size < MAX_TOY_BYTES


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_a_library_built_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    target = Target.load("cortex-a78")
    (tmp_path / "other").mkdir()
    first, second = build(target, tmp_path), build(target, tmp_path / "other")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_the_runtime_is_compiled_once_and_gives_the_same_bytes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def spy(triple: str, arguments: list[str], **options: Any) -> None:
        said.append(arguments)
        zig_cc(triple, arguments, **options)

    monkeypatch.setattr(c_runtime, "zig_cc", spy)
    # The libc stubs stay where they are: only what is kept beside them is made anew.
    cache = tmp_path / "cache" / "zig"
    monkeypatch.setattr(c_runtime, "cache_folder", lambda: cache)
    cache.mkdir(parents=True)
    target = Target.load("x86-64-v3")
    (tmp_path / "other").mkdir()
    first = build(target, tmp_path).read_bytes()
    (kept,) = cache.parent.glob("runtime-*")
    assert build(target, tmp_path / "other").read_bytes() == first
    assert len(said) == 1 and "-c" in said[0]
    kept.unlink()
    cache.parent.chmod(0o500)  # where it cannot be kept, for others than root, it is made anew
    assert build(target, tmp_path / "other").read_bytes() == first


@pytest.mark.parametrize("size", ["16k", "80k"])
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, size: str) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(OSError, match="No space left on device"):
            build(Target.load("x86-64-v3"), disk)
        assert list(disk.iterdir()) == []


@pytest.mark.usefixtures("compiled_anew")
def test_a_process_that_may_not_write_large_files_is_told_so_by_code_generation(
    tmp_path: Path,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(SlmError, match=r"files of 1,048,576 bytes at most \(ulimit -f\)"):
            build(Target.load("x86-64-v3"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_progress_says_what_is_being_done(tmp_path: Path) -> None:
    weights, (plan,) = merge_weights([toy_decoder()])
    said: list[str] = []
    target = Target.load("x86-64-v3")
    build_library(plan, target, tmp_path / "x.so", weights, progress=said.append)
    assert any("15 kernels" in message for message in said)
    assert any("linking" in message for message in said)


def test_a_feature_that_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    weights, (plan,) = merge_weights([toy_decoder()])
    target = replace(Target.load("cortex-a78"), requires=("asimd", "avx2"))
    with pytest.raises(TargetError, match="avx2"):
        build_library(plan, target, tmp_path / "x.so", weights)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    weights, (plan,) = merge_weights([toy_decoder()])
    with pytest.raises(FileNotFoundError, match="no/such"):
        build_library(plan, Target.load("x86-64-v3"), tmp_path / "no" / "such" / "x.so", weights)


def test_the_c_sources_agree_with_the_python_ones() -> None:
    tables = (RUNTIME / "plan_tables.h").read_text()
    cpu = (RUNTIME / "cpu.c").read_text()
    spaces = re.findall(r"^  SLM_SPACE_(\w+),", tables, re.M)
    assert spaces == [space.name for space in Space]
    assert f"#define SLM_MAX_ARGS {MAX_ARGS}\n" in tables
    assert f"#define SLM_ABI_VERSION {ABI_VERSION}\n" in (RUNTIME / "slm.h").read_text()
    for features in KNOWN_FEATURES.values():
        for feature in features:
            assert f'"{feature}"' in cpu


@pytest.mark.parametrize("name", known_targets())
def test_every_shipped_target_asks_for_features_that_can_be_checked(name: str) -> None:
    target = Target.load(name)
    assert set(target.requires) <= KNOWN_FEATURES[target.arch]


def test_python_declares_every_function_of_the_interface() -> None:
    header = (RUNTIME / "slm.h").read_text()
    assert set(PROTOTYPES) == set(re.findall(r"SLM_API [\w ]*\*?(slm_\w+)\(", header))
