"""Recipes of build systems: their hashes, a linter, make."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from slmtvm.packaging import Options
from slmtvm.packaging.contents import Contents
from tests.packaging.devices import tool
from tests.packaging.test_formats import run, succeed
from tests.packaging.updaters import write


def lint(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("oelint_adv") is None:
        pytest.skip("no oelint-adv here; pip install oelint-adv")
    return run(sys.executable, "-m", "oelint_adv", "--quiet", *arguments)


@pytest.mark.slow
def test_oelint_finds_no_error_in_a_recipe_and_one_in_an_altered_one(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    folder = write("yocto", contents, options, tmp_path / "recipes-slm" / "slm-toy")
    recipe = folder / "slm-toy_1.1.0.bb"
    result = lint("--exit-zero", "--release", "scarthgap", recipe)
    found = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    assert [line for line in found if ":error:" in line] == []
    recipe.write_text(recipe.read_text().replace("LICENSE =", "LICENCE ="))
    result = lint("--exit-zero", "--release", "scarthgap", recipe)
    assert ":error:oelint.var.mandatoryvar.LICENSE:" in result.stdout + result.stderr


def test_recipes_name_the_hash_of_the_package_beside_them(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    yocto = write("yocto", contents, options, tmp_path / "y" / "slm-toy")
    text = (yocto / "slm-toy_1.1.0.bb").read_text()
    (source,) = (yocto / "files").iterdir()
    assert f'file://{source.name}"' in text
    assert hashlib.sha256(source.read_bytes()).hexdigest() in text
    with tarfile.open(source) as tar:
        folder = re.search(r'^S = "\$\{WORKDIR\}/(.*)"$', text, re.M).group(1)
        terms = tar.extractfile(f"{folder}/share/licenses.txt").read()
    assert f"md5={hashlib.md5(terms).hexdigest()}" in text
    buildroot = write("buildroot", contents, options, tmp_path / "b" / "slm-toy")
    lines = (buildroot / "slm-toy.hash").read_text().splitlines()[1:]
    assert lines[0].split() == [
        "sha256", hashlib.sha256((buildroot / source.name).read_bytes()).hexdigest(), source.name,
    ]  # fmt: skip
    assert lines[1].split()[1] == hashlib.sha256(terms).hexdigest()


def test_make_expands_a_package_of_buildroot(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    """Buildroot's own rules are in no package; what they would run is."""
    make = tool("make", "make")
    folder = write("buildroot", contents, options, tmp_path / "b" / "slm-toy")
    with tarfile.open(folder / "slm-toy-1.1.0.tar.gz") as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "Makefile").write_text(
        f"D := {source}\n@D = {source}\nTARGET_DIR := {tmp_path}/target\n"
        f"SLM_TOY_PKGDIR := {folder}\ngeneric-package =\n"
        f"include {folder}/slm-toy.mk\n"
        "install:\n\t$(SLM_TOY_INSTALL_TARGET_CMDS)\n"
        "show:\n\t@echo $(SLM_TOY_SITE)/$(SLM_TOY_SOURCE)\n"
    )
    shown = succeed(make, "-s", "-C", tmp_path, "show").strip()
    assert Path(shown).is_file()
