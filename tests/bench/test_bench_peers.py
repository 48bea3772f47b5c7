"""How scripts/bench_peers.py turns times into ratios, and finds regressions."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import bench_peers
import onnx
import pytest
from bench_peers import Phase, Result, regressions, show, summarise
from onnx import numpy_helper

from slmtvm.importer import import_onnx

PHASE = Phase("decode", {"phase": "decode"}, 100)
SECONDS = {
    "slmtvm": [1.0, 2.0, 1.0],
    "slow": [4.0, 4.0, 4.0],
    "fast": [2.0, 5.0, 2.0],
}


def result(ratio: float) -> Result:
    return Result("demo", 1, "decode", 100.0, {"fast": 50.0}, {"fast": ratio}, "fast", ratio)


def test_rates_are_medians_over_rounds() -> None:
    made = summarise("demo", 2, PHASE, SECONDS)
    assert (made.model, made.threads, made.phase) == ("demo", 2, "decode")
    assert made.ours == 100
    assert made.peers == {"slow": 25, "fast": 50}


def test_a_ratio_is_the_median_of_ratios_within_a_round() -> None:
    made = summarise("demo", 1, PHASE, SECONDS)
    assert made.ratios == {"slow": 4, "fast": 2}
    assert (made.best, made.ratio_to_best) == ("fast", 2)


def test_peers_are_measured_without_ours() -> None:
    made = summarise("demo", 1, PHASE, {k: v for k, v in SECONDS.items() if k != "slmtvm"})
    assert made.peers == {"slow": 25, "fast": 50}
    assert made.ours != made.ours  # not a number


@pytest.mark.parametrize(("now", "found"), [(2.0, 0), (1.81, 0), (1.79, 1), (3.0, 0)])
def test_a_ratio_that_fell_by_more_than_a_tenth_is_a_regression(now: float, found: int) -> None:
    assert len(regressions([result(now)], [asdict(result(2.0))])) == found


def test_a_row_that_was_never_recorded_is_no_regression() -> None:
    other = replace(result(2.0), threads=2)
    assert regressions([result(0.1)], [asdict(other)]) == []


def test_the_table_names_every_engine() -> None:
    made = summarise("demo", 1, PHASE, SECONDS)
    header, line = show([made]).splitlines()
    assert "tokens/s" in header
    assert "slow 25 (4.00 [3.00..4.00])" in line and "fast 50 (2.00 [2.00..2.25])" in line


@pytest.mark.slow
def test_pruned_encoders_have_their_zeros_where_they_say_and_import(tmp_path: Path) -> None:
    files = bench_peers.engine_files("pruned-int8-80-1x4", tmp_path)
    path = files[bench_peers.DEEPSPARSE]
    model = import_onnx(path)
    linears = [layer for layer in model.layers if layer.kind == "linear"]
    assert model.kind == "encoder" and len(linears) == 6 * 6
    assert {layer.format for layer in linears} == {"int8"}
    graph = onnx.load(path).graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == 3]
    for weight in (w for w in weights if w.ndim == 2):
        runs = (weight.reshape(-1, 4, weight.shape[1]) != 0).any(axis=1)
        assert 0.18 < runs.mean() < 0.22


@pytest.mark.parametrize(
    "model", [*bench_peers.DECODERS, *bench_peers.ENCODERS, *bench_peers.PRUNED]
)
def test_every_model_has_phases_of_ordinary_tokens(model: str) -> None:
    for phase in bench_peers.phases(model):
        tokens = phase.command["tokens"]
        assert min(tokens) >= bench_peers.LOWEST_TOKEN
        assert max(tokens) < bench_peers.HIGHEST_TOKEN
        assert phase.tokens == phase.command.get("count", len(tokens))
