"""Altered graphs: the import ends in a model that is right, or in an SlmError, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.importer.altered_graphs import BASES, TINY, Tally, altered_graphs


def check(tally: Tally) -> None:
    assert not tally.bad, "\n".join(map(str, tally.bad))
    total = sum(tally.endings.values())
    assert tally.endings["agrees"] > 0.4 * total
    assert tally.endings["refused"] > 0.05 * total


def run(bases: tuple[str, ...], count: int, seed: int, folder: Path, **options: bool) -> Tally:
    tally = Tally()
    for verdict in altered_graphs(bases, count, seed, folder, **options):
        tally.add(verdict)
    return tally


@pytest.mark.slow
def test_altered_graphs_are_right_or_refused(tmp_path):
    check(run(tuple(TINY), 68, 1, tmp_path))


def _few_or_many(*numbers: int) -> list[object]:
    """The first by default, and the others exhaustively."""
    return [numbers[0], *(pytest.param(n, marks=pytest.mark.exhaustive) for n in numbers[1:])]


@pytest.mark.slow
@pytest.mark.parametrize("each", _few_or_many(1, 6))
def test_many_altered_graphs_are_right_or_refused(each, tmp_path):
    check(run(BASES, each * len(BASES), 2, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("each", _few_or_many(1, 2))
def test_altered_graphs_are_right_or_refused_when_compiled(each, tmp_path):
    check(run(tuple(TINY), each * len(TINY), 5, tmp_path, compiled=True))
