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


def test_altered_graphs_are_right_or_refused(tmp_path):
    check(run(tuple(TINY), 68, 1, tmp_path))


_MORE = [pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, *_MORE])
def test_many_altered_graphs_are_right_or_refused(seed, tmp_path):
    check(run(BASES, 2 * len(BASES), seed, tmp_path))


@pytest.mark.slow
def test_altered_graphs_are_right_or_refused_when_compiled(tmp_path):
    check(run(tuple(TINY), 2 * len(TINY), 5, tmp_path, compiled=True))
