"""An app's libraries: they ask for nothing but bionic, lie on pages of 16 kB, and compute the bits.

No Android is here. The dynamic section says what a device's loader would look for; and the library
of this machine's ABI runs with a small library in bionic's place, which knows it by its numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import slmtvm
from slmtvm.codegen.zig import caches, zig_cc
from slmtvm.errors import SlmError
from slmtvm.packaging import Options, package
from slmtvm.packaging.android import ABIS, BIONIC, PAGE_BYTES, write_android
from slmtvm.packaging.contents import Contents
from slmtvm.runtime import load
from slmtvm.runtime.text import generate_text
from slmtvm.target import Target
from tests.emulation.session import EmulatedSession
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.models import TOKENIZER
from tests.packaging.android_stubs import write_stubs
from tests.packaging.conftest import Release
from tests.packaging.devices import HOST, tool

pytestmark = pytest.mark.slow
TOKENS = np.array([1, 2, 3, 4, 5, 6, 7], np.int32)
SOURCES = Path(__file__).parents[1] / "emulation" / "slm_eval.c"
JVM = Path("/usr/lib/jvm")
TARGETS = sorted({HOST, "cortex-a78"} if Target.load(HOST).arch == "x86_64" else {HOST})
# What differs in bionic; any other number of sysconf would be another constant of musl's.
IN_BIONICS_PLACE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
int *__errno(void) { return &errno; }
long sysconf(int name) {
  long (*real)(int) = (long (*)(int))dlsym(RTLD_NEXT, "sysconf");
  if (name != 0x61) abort();
  return real(_SC_NPROCESSORS_ONLN);
}
"""


@pytest.fixture(scope="module")
def module(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a model for the ABIs."""
    folder = tmp_path_factory.mktemp("android") / "toy"
    return package(release.bundle(1), "android", folder, target=TARGETS, license="Apache-2.0")


def abi(target: str) -> str:
    return ABIS[Target.load(target).arch]


@pytest.mark.parametrize("target", TARGETS)
def test_a_library_needs_only_what_bionic_has_and_lies_on_pages_of_16_kb(
    target: str, module: Path
) -> None:
    readelf = tool("readelf", "binutils")
    library = module / "jniLibs" / abi(target) / "libslm_toy.so"

    def read(*options: str) -> str:
        command = [readelf, "-W", *options, library]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    dynamic = read("-d")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed and set(needed) <= {"libc.so", "libm.so"}
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == ["libslm_toy.so"]
    for tag in ("(HASH)", "(GNU_HASH)"):
        assert tag in dynamic
    for tag in ("TEXTREL", "RPATH", "RUNPATH", "VERNEED"):
        assert tag not in dynamic
    segments = [line.split() for line in read("-l").splitlines() if line.strip()]
    loads = [s for s in segments if s[0] == "LOAD"]
    assert len(loads) > 1
    for load_ in loads:
        offset, address, align = int(load_[1], 16), int(load_[2], 16), int(load_[-1], 16)
        assert align == PAGE_BYTES and (address - offset) % PAGE_BYTES == 0
    # No thread-local storage, of which bionic has less; a stack that is not executed.
    assert not [s for s in segments if s[0] == "TLS"]
    (stack,) = [s for s in segments if s[0] == "GNU_STACK"]
    assert "RWE" not in stack
    symbols = [line.split() for line in read("--dyn-syms").splitlines()]
    undefined = {s[7] for s in symbols if len(s) > 7 and s[6] == "UND"}
    assert undefined <= {name for names in BIONIC.values() for name in names}
    exported = {s[7] for s in symbols if len(s) > 7 and s[6] not in ("UND", "ABS", "Ndx")}
    assert "slm_open" in exported and all(name.startswith("slm_") for name in exported)


def test_the_library_of_this_machine_computes_the_bits_of_the_bundle(
    module: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target.load(HOST)
    libraries = module / "jniLibs" / abi(HOST)
    (tmp_path / "place.c").write_text(IN_BIONICS_PLACE)
    (tmp_path / "maths.c").write_text("double exp(double); double use(double x) { return exp(x); }")
    for name, source in (("libc.so", "place.c"), ("libm.so", "maths.c")):
        zig_cc(target.link, ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, source, "-ldl",
                             "-lm"], folder=tmp_path)  # fmt: skip
    program = tmp_path / "slm_eval"
    zig_cc(target.link, ["-O1", f"-I{module / 'include'}", "-o", str(program), str(SOURCES),
                         str(libraries / "libslm_toy.so"), "-Wl,--allow-shlib-undefined",
                         f"-Wl,-rpath,{libraries}", "-lpthread"])  # fmt: skip
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "libc.so"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    session = EmulatedSession(module / "assets/slm/toy", target, program, None)
    with load(release.bundle(1)) as expected:
        wanted = expected.eval_all(TOKENS)
    for threads in (1, 2):
        found = session.eval_all(TOKENS, len(TOKENS), threads)
        assert found.tobytes() == wanted.tobytes()


def test_the_sample_compiles_and_kotlin_declares_what_it_defines(
    module: Path, tmp_path: Path
) -> None:
    sample = module / "sample"
    kotlin, cpp = (sample / "Model.kt").read_text(), (sample / "slm_jni.cpp").read_text()
    declared = set(re.findall(r"external fun (\w+)\(", kotlin))
    assert declared == set(re.findall(r"Java_org_slmtvm_Model_(\w+)\(", cpp)) != set()
    assert 'loadLibrary("slm_toy")' in kotlin
    assert (
        "lib/libslm_toy.so" not in kotlin
        and "slm_toy.so" in (sample / "CMakeLists.txt").read_text()
    )
    for file in sample.iterdir():
        assert "@" not in re.sub(r"@(JvmStatic|Synchronized)", "", file.read_text())
    headers = sorted(JVM.glob("*/include/jni.h"))
    if not headers:
        pytest.skip("no jni.h here; on Debian and Ubuntu: apt install default-jdk-headless")
    folder = headers[0].parent
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "c++",
        "-target",
        f"{os.uname().machine}-linux-gnu",
    ]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{folder}", f"-I{folder / 'linux'}"]
    files = [f"-I{module / 'include'}", "-c", sample / "slm_jni.cpp", "-o", tmp_path / "slm_jni.o"]
    done = subprocess.run(
        [*compiler, *flags, *map(str, files)], capture_output=True, text=True,
        env={**os.environ, **caches()},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def run_tool(*command: object, environment: dict[str, str] | None = None) -> str:
    """Its output; it succeeds."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_the_sample_in_kotlin_writes_the_text_of_a_session(tmp_path: Path) -> None:
    """Compiled against stubs of Android's classes, and run on Java with the library of this ABI."""
    kotlinc, javac = tool("kotlinc", "kotlin"), tool("javac", "default-jdk-headless")
    java = tool("java", "default-jdk-headless")
    headers = sorted(JVM.glob("*/include/jni.h"))
    standard = Path("/usr/share/java/kotlin-stdlib.jar")
    if not headers or not standard.is_file():
        pytest.skip("no jni.h or kotlin-stdlib.jar; apt install default-jdk-headless kotlin")
    save(build(Tiny(vocab=4096)), tmp_path)
    bundle = slmtvm.compile(
        tmp_path / "model.onnx", output=tmp_path / "toy.slm", context=64, tokenizer=TOKENIZER
    )
    target = Target.load(bundle.targets[0])
    module = package(bundle.path, "android", tmp_path / "module", license="Apache-2.0")
    sources = write_stubs(tmp_path / "stubs")
    classes, libraries = tmp_path / "out", tmp_path / "lib"
    run_tool(kotlinc, "-no-reflect", module / "sample/Model.kt", tmp_path / "stubs", "-d", classes)
    run_tool(javac, "-cp", f"{classes}:{standard}", "-d", classes, *sources)
    libraries.mkdir()
    shutil.copy(module / "jniLibs" / ABIS[target.arch] / "libslm_toy.so", libraries)
    # Java asks sysconf for other numbers, those of this machine's library.
    stands_in = IN_BIONICS_PLACE.replace("abort()", "return real(name)")
    (tmp_path / "place.c").write_text(stands_in)
    (tmp_path / "maths.c").write_text("double exp(double); double use(double x) { return exp(x); }")
    for name, source in (("libc.so", "place.c"), ("libm.so", "maths.c")):
        zig_cc(target.link, ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", f"lib/{name}", source,
                             "-ldl", "-lm"], folder=tmp_path)  # fmt: skip
    jni = headers[0].parent
    run_tool(
        sys.executable, "-m", "ziglang", "c++", "-target", f"{os.uname().machine}-linux-gnu",
        "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{jni}", f"-I{jni / 'linux'}",
        f"-I{module / 'include'}", module / "sample/slm_jni.cpp", libraries / "libslm_toy.so",
        "-Wl,--allow-shlib-undefined", "-o", libraries / "libslm_jni.so",
        environment=caches(),
    )  # fmt: skip
    (tmp_path / "files").mkdir()
    prompt, most = "def f(x):", 12
    told = run_tool(
        java, "-cp", f"{classes}:{standard}", f"-Djava.library.path={libraries}", "Main",
        module / "assets", tmp_path / "files", prompt, most,
        environment={"LD_LIBRARY_PATH": str(libraries), "LD_PRELOAD": str(libraries / "libc.so")},
    )  # fmt: skip
    with load(bundle.path) as session:
        text = "".join(generate_text(session, prompt, most))
    assert told == f"{text}\n{text}\nthe model is closed\n"


def test_a_package_has_the_bundle_but_for_other_libraries(module: Path, release: Release) -> None:
    assets = {path.name for path in (module / "assets/slm/toy").iterdir()}
    there = {path.name for path in release.bundle(1).iterdir() if path.is_file()}
    assert assets == there
    assert (module / "share" / HOST / "licenses.txt").is_file()


def test_what_is_no_app_says_why(contents: Contents, tmp_path: Path) -> None:
    foreign = replace(contents, target="board", entry=replace(contents.entry, arch="riscv64"))
    for several, message in (
        ([contents, contents], "one library an ABI"),
        ([foreign], "board is riscv64, and apps are made for x86_64, aarch64"),
    ):
        with pytest.raises(SlmError, match=message):
            write_android(several, tmp_path / "x", Options())
    assert list(tmp_path.iterdir()) == []
