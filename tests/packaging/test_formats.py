"""Each format by the tools that read it: whole packages are taken, altered ones refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slmtvm.errors import SlmError
from slmtvm.packaging import Options, package
from slmtvm.runtime import load
from tests.packaging.conftest import Keys, Release
from tests.packaging.devices import DEVICES, HOST, emulator, tool

MAINTAINER = "Ada Example <ada@example.org>"
OPTIONS = Options(maintainer=MAINTAINER)
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}
TOKENS = [1, 2, 3, 4, 5]


def make(release: Release, format: str, folder: Path, target: str | None = HOST) -> Path:
    output = folder if format == "wheel" else folder / f"{target}.{format}"
    return package(
        release.bundle(1), format, output, target=target, license="Apache-2.0",
        options=OPTIONS,
    )  # fmt: skip


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=120, **options
    )


def succeed(*command: str | Path, **options: Any) -> str:
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def altered(path: Path, folder: Path, *, seed: int = 0) -> Path:
    """A copy of ``path`` with one bit changed in its middle."""
    content = bytearray(path.read_bytes())
    at = random.Random(seed).randrange(len(content) // 4, len(content) * 3 // 4)
    content[at] ^= 1
    copy = folder / path.name
    copy.write_bytes(content)
    return copy


def check(program: Path, bundle: Path, keys: Keys, target: str = HOST) -> None:
    command = [*emulator(target), program, bundle, "--keys", keys.public, "--seconds", "0"]
    assert succeed(*command, "--threads", "1").endswith("ok\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "format", ["tar.gz", "deb", "wheel", pytest.param("oci", marks=pytest.mark.slow)]
)
def test_packages_made_in_two_folders_have_equal_bytes(
    format: str, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = None if format == "oci" else HOST
    first = make(release, format, tmp_path / "a", target)
    bundle = shutil.copytree(release.bundle(1), tmp_path / "b" / "deeper" / "toy.slm")
    for item in bundle.rglob("*"):
        os.utime(item, (1e9, 1e9))
    monkeypatch.chdir(tmp_path / "b")
    output = Path("deeper/wheels") if format == "wheel" else Path("deeper/second")
    second = package(
        bundle,
        format,
        output,
        target=target,
        license="Apache-2.0",
        options=OPTIONS,
    )
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
def test_dpkg_unpacks_a_deb_that_works(
    target: str, release: Release, keys: Keys, tmp_path: Path
) -> None:
    dpkg = tool("dpkg-deb", "dpkg")
    path = make(release, "deb", tmp_path, target)
    fields = dict(
        line.split(": ", 1) for line in succeed(dpkg, "-f", path).splitlines() if line[0] != " "
    )
    assert (fields["Package"], fields["Version"]) == ("slm-toy", "1.1.0")
    arch = {"cortex-a78": "arm64", "riscv64-rvv": "riscv64"}.get(target) or DEBIAN[
        os.uname().machine
    ]
    assert fields["Architecture"] == arch and fields["Maintainer"] == MAINTAINER
    succeed(dpkg, "-x", path, tmp_path / "root")
    folder = tmp_path / "root/usr/lib/slm/toy"
    check(folder / "bin/slm-selftest", folder / "bundle", keys, target)
    sums = succeed(dpkg, "-I", path, "md5sums")
    succeed("md5sum", "-c", "-", cwd=tmp_path / "root", input=sums)


@pytest.mark.slow
def test_lintian_finds_no_fault_in_a_deb(release: Release, tmp_path: Path) -> None:
    lintian = tool("lintian", "lintian")
    result = run(lintian, "--allow-root", "--fail-on", "error", make(release, "deb", tmp_path))
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_systemd_takes_the_service_of_a_deb_and_calls_it_well_confined(
    release: Release, tmp_path: Path
) -> None:
    analyze, dpkg = tool("systemd-analyze", "systemd"), tool("dpkg-deb", "dpkg")
    root = tmp_path / "root"
    succeed(dpkg, "-x", make(release, "deb", tmp_path), root)
    unit = root / "usr/lib/systemd/system/slm-toy.service"
    assert (root / "usr/lib/slm/toy/bin/slm-serve").is_file()
    for name in ("sysinit", "basic", "shutdown", "network", "multi-user"):  # a distribution's
        unit.with_name(f"{name}.target").write_text("[Unit]\nDescription=part of the system\n")
    (root / "bin").mkdir()
    shutil.copy(tool("kill", "procps"), root / "bin/kill")
    checked = run(analyze, f"--root={root}", "--man=no", "verify", unit.name)
    assert (checked.returncode, checked.stderr) == (0, "")
    judged = run(analyze, "security", "--offline=yes", "--threshold=20", unit)
    assert judged.returncode == 0, judged.stdout  # of 100, where 100 is not confined at all


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_dpkg_installs_a_deb_into_a_root_and_takes_it_out(
    release: Release, keys: Keys, tmp_path: Path
) -> None:
    dpkg = tool("dpkg", "dpkg")
    root = tmp_path / "root"
    for name in ("var/lib/dpkg/info", "var/lib/dpkg/updates"):
        (root / name).mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text("")
    path = make(release, "deb", tmp_path)
    options = ["--root", root, "--force-depends", "--force-script-chrootless"]
    succeed(dpkg, *options, "-i", path)
    folder = root / "usr/lib/slm/toy"
    check(folder / "bin/slm-selftest", folder / "bundle", keys)
    assert run(dpkg, "--root", root, "-V", "slm-toy").stdout == ""
    weights = folder / "bundle/weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert "bundle/weights.bin" in run(dpkg, "--root", root, "-V", "slm-toy").stdout
    succeed(dpkg, *options, "-r", "slm-toy")
    assert not folder.exists()


@pytest.mark.slow
def test_dpkg_refuses_an_altered_deb(release: Release, tmp_path: Path) -> None:
    dpkg = tool("dpkg-deb", "dpkg")
    path = make(release, "deb", tmp_path)
    (tmp_path / "altered").mkdir()
    for seed in range(5):
        damaged = altered(path, tmp_path / "altered", seed=seed)
        assert run(dpkg, "-x", damaged, tmp_path / "root").returncode != 0


@pytest.mark.parametrize(
    "maintainer", [None, "Ada", "ada@example.org", "Ada <ada@example.org>\nX: y"]
)
def test_a_deb_names_who_answers_for_it(
    maintainer: str | None, release: Release, tmp_path: Path
) -> None:
    with pytest.raises(SlmError, match="--maintainer: a Debian package names who"):
        package(
            release.bundle(1),
            "deb",
            tmp_path / "x.deb",
            target=HOST,
            options=Options(maintainer=maintainer),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_skopeo_and_umoci_read_an_image_for_every_architecture(
    release: Release, keys: Keys, tmp_path: Path
) -> None:
    skopeo, umoci = tool("skopeo", "skopeo"), tool("umoci", "umoci")
    archive = make(release, "oci", tmp_path, None)
    weights = set()
    for target, arch in zip(DEVICES, ("amd64", "arm64", "riscv64"), strict=True):
        if target == HOST:
            arch = DEBIAN[os.uname().machine]
        layout = tmp_path / arch
        succeed(skopeo, "--override-arch", arch, "copy", f"oci-archive:{archive}",
                f"oci:{layout}:v")  # fmt: skip
        config = json.loads(succeed(skopeo, "inspect", "--config", f"oci:{layout}:v"))
        assert config["architecture"] == arch
        assert config["config"]["User"] == "65532:65532"
        assert config["config"]["Entrypoint"] == ["/slm/bin/slm-serve", "/slm/bundle"]
        assert config["config"]["Labels"]["org.opencontainers.image.version"] == "1.1.0"
        weights.add(config["rootfs"]["diff_ids"][0])
        rootless = [] if os.geteuid() == 0 else ["--rootless"]
        succeed(umoci, "unpack", *rootless, "--image", f"{layout}:v", tmp_path / f"{arch}-root")
        folder = tmp_path / f"{arch}-root/rootfs/slm"
        check(folder / "bin/slm-selftest", folder / "bundle", keys, target)
    assert len(weights) == 1  # one layer for all


@pytest.mark.slow
def test_an_update_of_all_but_the_weights_leaves_their_layer(
    release: Release, tmp_path: Path
) -> None:
    skopeo = tool("skopeo", "skopeo")
    one = make(release, "oci", tmp_path / "one")
    two = package(release.bundle(1), "oci", tmp_path / "two.oci", target=HOST, license="CC0-1.0")
    layers = [
        json.loads(succeed(skopeo, "inspect", f"oci-archive:{p}"))["Layers"] for p in (one, two)
    ]
    assert layers[0][0] == layers[1][0] and layers[0][1] != layers[1][1]


def test_skopeo_refuses_an_altered_image(release: Release, tmp_path: Path) -> None:
    skopeo = tool("skopeo", "skopeo")
    archive = make(release, "oci", tmp_path)
    content = bytearray(archive.read_bytes())
    weights = (release.bundle(1) / "weights.bin").read_bytes()
    content[content.index(weights) + len(weights) // 2] ^= 1
    archive.write_bytes(content)
    result = run(skopeo, "copy", f"oci-archive:{archive}", f"oci:{tmp_path / 'out'}:v")
    assert result.returncode != 0 and "digest" in result.stderr.lower()


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the wheel for this machine into."""
    folder = tmp_path_factory.mktemp("wheel")
    path = make(release, "wheel", folder)
    result = pip("install", "--quiet", "--no-index", "--target", folder / "site", path)
    assert result.returncode == 0, result.stderr
    return folder / "site"


def python(installed: Path, code: str, *, site: bool = False) -> str:
    """What ``code`` prints where nothing is to be imported but ``installed``."""
    options = ["-I"] if site else ["-I", "-S"]
    prefix = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    return succeed(sys.executable, *options, "-c", prefix + code)


@pytest.mark.slow
@pytest.mark.parametrize("numpy", [False, True])
def test_an_installed_wheel_computes_the_bits_of_the_bundle(
    numpy: bool, installed: Path, release: Release, keys: Keys
) -> None:
    code = f"""
import json, sys, toy
with toy.load(public_keys=open({str(keys.public)!r}).read(), least_counter=1) as session:
    every = session.eval_all({TOKENS})
    session.seek(0)
    last = session.eval({TOKENS})
    assert list(every[-1]) == list(last) and session.position == {len(TOKENS)}
    tokens = list(session.generate(4))
    print(json.dumps([[float(v) for v in last], tokens, "numpy" in sys.modules]))
"""
    logits, tokens, had_numpy = json.loads(python(installed, code, site=numpy))
    with load(release.bundle(1)) as session:
        wanted = session.eval(TOKENS)
        assert logits == wanted.tolist()
        for token in tokens:  # the likeliest, one after the other
            assert token == wanted.argmax()
            wanted = session.eval([token])
    assert had_numpy == numpy


@pytest.mark.slow
def test_an_installed_wheel_brings_its_self_test_and_papers(installed: Path, keys: Keys) -> None:
    check(installed / "toy/bin/slm-selftest", installed / "toy/bundle", keys)
    info = installed / "toy-1.1.0.dist-info"
    assert json.loads((info / "sboms/sbom.cdx.json").read_text())["bomFormat"] == "CycloneDX"
    assert "Apache License" in (info / "licenses/licenses.txt").read_text()


def test_the_binding_says_what_the_library_says(installed: Path, other_keys: Keys) -> None:
    code = f"""
import toy
for call in (lambda: toy.load(public_keys=open({str(other_keys.public)!r}).read()),
             lambda: toy.load().eval([1000]), lambda: toy.load(threads=-1)):
    try:
        call()
    except toy.ModelError as error:
        print(error)
"""
    lines = python(installed, code).splitlines()
    assert "signed by no public key that is trusted" in lines[0]
    assert "1000" in lines[1] and "threads is -1" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["cortex-a78", pytest.param("riscv64-rvv", marks=pytest.mark.slow)]
)
def test_pip_takes_no_wheel_for_another_machine(
    target: str, release: Release, tmp_path: Path
) -> None:
    path = make(release, "wheel", tmp_path, target)
    arch = {"cortex-a78": "aarch64", "riscv64-rvv": "riscv64"}[target]
    assert path.name == f"toy-1.1.0-py3-none-manylinux_2_28_{arch}.whl"
    result = pip("install", "--no-index", "--target", tmp_path / "site", path)
    assert result.returncode != 0 and "not a supported wheel on this platform" in result.stderr


@pytest.mark.slow
def test_several_targets_of_one_machine_are_no_image(release: Release, tmp_path: Path) -> None:
    def failing(targets: Sequence[str]) -> None:
        package(release.bundle(1), "oci", tmp_path / "x", target=targets)

    with pytest.raises(SlmError, match="one target an architecture"):
        failing([HOST, HOST])
    with pytest.raises(SlmError, match="has one, not 2"):
        package(release.bundle(1), "deb", tmp_path / "x", target=[HOST, "cortex-a78"])
