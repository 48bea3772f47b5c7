"""Plots of records: what they show, and what stands in their way."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from slmtvm.cli import main
from slmtvm.errors import SlmError
from slmtvm.tuning.plot import plot
from slmtvm.tuning.records import Record, RecordFile
from tests.tuning.tasks import KEY, key, record

KNOBS = {"mr": 1, "nv": 2, "pf": 0, "ku": 16, "gu": 2, "ps": 0}
_SVG = "{http://www.w3.org/2000/svg}"


def _records() -> list[Record]:
    settings = [{**KNOBS, "nv": nv, "pf": pf} for nv in (1, 2, 4) for pf in (0, 512)]
    measured = [record(knobs=k, ratio=0.8 + 0.1 * i) for i, k in enumerate(settings)]
    failed = record(knobs=KNOBS, seconds=(), default_seconds=(), failure="ends with signal 4")
    return [*measured, failed, record(key(), knobs=KNOBS)]


def _texts(path: Path) -> list[str]:
    return ["".join(t.itertext()).strip() for t in ElementTree.parse(path).iter(f"{_SVG}text")]


@pytest.mark.slow
def test_a_row_for_each_kernel_shows_its_trials_and_the_knobs_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    assert plot(_records(), path) == 0
    texts = _texts(path)
    assert any(KEY.label in text for text in texts)
    assert {"nv", "pf"} <= set(texts) and not {"mr", "ku"} & set(texts)
    assert texts.count("trial") == 2
    groups = [
        g for g in ElementTree.parse(path).iter(f"{_SVG}g") if "PathCollection" in g.get("id", "")
    ]
    points = [len(list(g.iter(f"{_SVG}use"))) for g in groups]
    assert sorted(points) == [1, 6, 6, 6]  # failures have no time


@pytest.mark.slow
def test_only_the_kernels_with_the_most_records_are_shown(tmp_path: Path) -> None:
    records = [record(key(n=16 * n), knobs=KNOBS) for n in range(1, 15)]
    assert plot(records, tmp_path / "plot.png") == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_cannot_be_plotted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SlmError, match="no setting was measured"):
        plot([], tmp_path / "x.svg")
    with pytest.raises(SlmError, match=r"x\.none: cannot be written"):
        plot(_records(), tmp_path / "x.none")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SlmError, match=r"pip install 'slmtvm\[plot\]'"):
        plot(_records(), tmp_path / "x.svg")


@pytest.mark.slow
def test_the_verb_writes_the_plot_beside_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RecordFile(tmp_path / "r.jsonl").append(_records())
    path = tmp_path / "plot.svg"
    assert main(["records", "show", str(tmp_path / "r.jsonl"), "--plot", str(path)]) == 0
    assert KEY.label in capsys.readouterr().out and path.stat().st_size > 1000
