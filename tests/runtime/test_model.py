"""Which library of a bundle is loaded, and that a wrong or changed one never is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.manifest import FileEntry, TargetEntry
from slmtvm.bundle.write import write_bundle
from slmtvm.errors import BundleError
from slmtvm.runtime import load
from slmtvm.runtime.model import choose_target
from slmtvm.target import Target, known_targets
from tests.runtime.toy import decoder_reference, toy_decoder, toy_weights


def entry(name: str) -> TargetEntry:
    target = Target.load(name)
    files = (FileEntry(f"lib/{name}.{kind}", 0, "0" * 64) for kind in ("so", "o"))
    return TargetEntry(*files, target.link, 1, target.arch, target.requires, {})


ALL = {name: entry(name) for name in known_targets()}


@pytest.mark.parametrize(
    ("machine", "features", "wanted"),
    [
        ("x86_64", {*ALL["x86-64-v4-vnni"].requires, "sse2"}, "x86-64-v4-vnni"),
        ("x86_64", {*ALL["x86-64-v3"].requires, "avx512f"}, "x86-64-v3"),
        ("aarch64", {*ALL["cortex-a78"].requires, "fp"}, "cortex-a78"),
        ("aarch64", {*ALL["cortex-a72"].requires, "crc32"}, "cortex-a72"),
        ("riscv64", set("imafdcv"), "riscv64-rvv"),
    ],
)
def test_the_library_that_uses_most_of_the_cpu_is_chosen(
    machine: str, features: set[str], wanted: str
) -> None:
    assert choose_target(ALL, machine, features, "x.slm") == wanted


@pytest.mark.parametrize(
    ("machine", "features"),
    [("x86_64", {"sse2"}), ("riscv64", set("imafdc")), ("ppc64le", {"avx2", "fma", "f16c"})],
)
def test_without_a_fitting_library_the_error_lists_what_there_is(
    machine: str, features: set[str]
) -> None:
    with pytest.raises(BundleError, match=r"x\.slm: nothing here runs.*cortex-a72 \(aarch64 asimd"):
        choose_target(ALL, machine, features, "x.slm")


def test_a_target_that_is_not_there_is_named(decoder: Path) -> None:
    with pytest.raises(BundleError, match="no library for target 'orin'; there are"):
        load(decoder, target="orin")


def test_a_library_of_another_architecture_is_an_error(tmp_path: Path) -> None:
    foreign = "cortex-a72" if "x86" in Target.load("host").arch else "x86-64-v3"
    write_bundle(tmp_path / "x.slm", [(Target.load(foreign), toy_decoder())])
    with pytest.raises(BundleError, match="nothing here runs"):
        load(tmp_path / "x.slm")
    with pytest.raises(BundleError, match="cannot be loaded"):
        load(tmp_path / "x.slm", target=foreign)


def test_a_replaced_bundle_is_loaded_afresh_while_the_old_one_still_runs(tmp_path: Path) -> None:
    target, path = Target.load("host"), tmp_path / "x.slm"
    weights = [toy_weights(seed) for seed in (1, 2)]
    write_bundle(path, [(target, toy_decoder(weights[0]))])
    with load(path) as old:
        write_bundle(path, [(target, toy_decoder(weights[1], context=40, extra_bytes=5000))])
        with load(path) as new:
            for session, wanted in ((old, weights[0]), (new, weights[1])):
                logits = session.eval([1, 2, 3])
                np.testing.assert_array_equal(logits, decoder_reference([1, 2, 3], wanted)[-1])
            assert (old.info["context"], new.info["context"]) == (50, 40)


def test_unchecked_weights_are_still_the_right_file(decoder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(decoder, tmp_path / "x.slm")
    weights = path / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    load(path, check=False).close()
    with pytest.raises(BundleError, match="checksum"):
        load(path)
    content[16] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="belong to another library"):
        load(path, check=False)


def test_running_a_bundle_needs_no_compiler(decoder: Path) -> None:
    program = (
        "import sys; from slmtvm.runtime import load; load(sys.argv[1]).eval([1]);"
        "print(sorted({'tvm', 'onnx', 'onnxruntime', 'ziglang'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program, str(decoder)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("[]\n", "")
