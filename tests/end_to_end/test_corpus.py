"""A model of each kind of the corpus, compiled for this machine, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus.agreement import ROUNDED, Agreement
from corpus.check import CONTEXT, Outcome, check, judge
from corpus.selection import is_pruned

from slmtvm.compiler import compile_model
from slmtvm.errors import SlmError
from tests.importer.corpus_gaps import reason
from tests.models.corpus import corpus_path

FILES = (
    "bart-optimum-merged/decoder_model_merged.onnx",
    "bert-pruned-optimum-dynamic-s8/model.onnx",  # patterns of zeros, skipped
    "bert-optimum-qdq-u8s8/model.onnx",
    "bloom-dynamo/model.onnx",  # biases by distance
    "distilbert-dynamo/model.onnx",
    "gemma2-optimum-past/model.onnx",  # windows, capped scores
    "gpt-neox-optimum-past/model.onnx",  # partial rotary positions
    "gpt2-dynamo-past/model.onnx",
    "lfm2-moe-builder-int4/model.onnx",  # experts, convolutions
    "llama-builder-int4/model.onnx",
    "llama-optimum-past-int4-block32-zp/model.onnx",
    "mixtral-script-masked/model.onnx",
    "mpnet-dynamo/model.onnx",
    "phi3-optimum-past/model.onnx",
    "qwen3-optimum-past/model.onnx",  # norms of heads
    "t5-optimum/decoder_model.onnx",
)
# Heads with padding on these sides, as far as the chain goes.
HEADS = {
    "bart-script-sequence": (["right"], "time"),
    "distilbert-optimum-token": (["left", "right"], "default"),
    "distilbert-dynamo-span": (["left", "right"], "time"),
    "distilbert-script-embedding": (["left", "right"], "default"),
    "mpnet-optimum-sequence-qdq-u8s8": (["right"], "time"),  # calibrated without padding
    "qwen3-optimum-sequence": (["left"], "default"),
}


def _param(file: str) -> object:
    missing = reason(file)
    marks = [pytest.mark.xfail(strict=True, reason=missing)] if missing else []
    return pytest.param(file, id=file.split("/")[0], marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("file", [_param(file) for file in FILES])
def test_a_compiled_model_of_the_corpus_computes_what_onnxruntime_computes(
    file: str, tmp_path: Path
) -> None:
    outcome = check(corpus_path(*file.split("/")), tmp_path, "compile")
    assert not outcome.error and outcome.held
    assert bool(outcome.skipping) == is_pruned(file.split("/")[0])
    assert outcome.stage == "compile"


@pytest.mark.slow
@pytest.mark.parametrize("cell", HEADS)
def test_a_task_head_of_the_corpus_goes_through_the_whole_chain_with_padding_on_either_side(
    cell: str, tmp_path: Path
) -> None:
    sides, stage = HEADS[cell]
    outcome = check(corpus_path(cell), tmp_path)
    assert not outcome.error and outcome.held
    assert list(outcome.padded) == sides and all(outcome.padded.values())
    assert outcome.stage == stage and outcome.speed > 0


@pytest.mark.slow
@pytest.mark.parametrize("file", [_param(file) for file in FILES[::4]])
def test_a_model_of_the_corpus_passes_the_check_of_the_compiler(file: str, tmp_path: Path) -> None:
    path = corpus_path(*file.split("/"))
    bundle = compile_model(path, output=tmp_path / "model.slm", context=CONTEXT)
    assert "skipped" not in bundle.manifest.extra["check"]


@pytest.mark.parametrize("own", [0.02, 0.01, float("nan")])
def test_rows_apart_pass_as_turned_only_where_onnxruntimes_are_as_far_apart(own: float) -> None:
    outcome = Outcome("model.onnx")
    apart = Agreement(ROUNDED, difference=0.02, single=None, cosine=0.99, top1=1.0)
    if own == 0.02:
        judge(apart, lambda: own, outcome)
        assert outcome.own == own and not outcome.held
    else:
        with pytest.raises(SlmError, match=r"0\.02 of the range.*it from itself"):
            judge(apart, lambda: own, outcome)


def test_a_file_that_keeps_its_rule_is_not_compared_with_onnxruntimes_own_difference() -> None:
    def own() -> float:
        raise AssertionError("must not be computed")

    outcome = Outcome("model.onnx")
    judge(Agreement(ROUNDED, difference=0.02, single=None, cosine=0.9999, top1=1.0), own, outcome)
    assert outcome.held
