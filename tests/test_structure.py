"""Modules import each other in the order in which data flows, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import slmtvm

_ROOT = Path(slmtvm.__file__).parent
# Each stage of the import with those whose values it reads.
_IMPORTER = {
    "faults": set(),
    "graph": set(),
    "operators": {"graph"},
    "rewrite": {"graph", "operators"},
    "freeze": {"faults", "graph", "operators", "rewrite"},
    "expand": {"faults", "freeze", "graph", "operators"},
    "read": {"expand", "faults", "graph", "operators"},
    "frame": {"expand", "freeze", "graph", "operators", "rewrite"},
    "recognise": {"faults", "frame", "freeze", "graph", "operators", "rewrite"},
    "emit": {"graph", "recognise"},
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(_ROOT.rglob("*.py")) + sorted((_ROOT / "schedules").rglob("*.py")):
        parts = ("slmtvm", *path.relative_to(_ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that one imports anywhere, in functions and for types, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in modules else node.module for name in names)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    modules = _modules()
    # The names that the package offers are imported when they are used, and for types.
    del modules["slmtvm"]
    return {name: set(_imported(path, modules)) - {name} for name, path in modules.items()}


def test_no_modules_import_each_other_in_a_circle(imports):
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_each_stage_of_the_import_reads_only_stages_before_it(imports):
    prefix = "slmtvm.importer."
    found: dict[str, set[str]] = {stage: set() for stage in _IMPORTER}
    for name, needed in imports.items():
        stage = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and stage in _IMPORTER:
            others = {n.removeprefix(prefix).partition(".")[0] for n in needed if prefix in n}
            found[stage] |= others - {stage}
    assert found == {stage: found[stage] & allowed for stage, allowed in _IMPORTER.items()}
