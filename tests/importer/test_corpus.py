"""Every export of the corpus imports, and its ops compute what onnxruntime computes on the file.

Files that do not yet are in tests/importer/corpus_gaps.py with what is missing. Their tests fail
once they pass: whoever makes a file work takes it out of there.
"""

from __future__ import annotations

from itertools import combinations

import pytest
from corpus.agreement import compare, rule_of
from corpus.check import CONTEXT, context_of
from corpus.inputs import ended, source_of, token_sequences
from corpus.oracle import wanted_rows
from corpus.outputs import our_rows
from corpus.selection import is_model

from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx
from tests.importer.corpus_gaps import GAPS, reason
from tests.models.corpus import ARCHIVES, cells, corpus_path, families, family_of

FILES = [f"{cell}/{name}" for cell, names in cells().items() for name in names if is_model(name)]
MOST_BYTES = 13_000_000


def _parts(file: str, together: int) -> set[tuple[str, ...]]:
    """What a file's name says of it: family, route and quantization, and ``together`` of them."""
    cell = file.split("/")[0]
    family = family_of(cell)
    parts = sorted({family, *cell.removeprefix(f"{family}-").split("-")})
    return {c for count in range(1, together + 1) for c in combinations(parts, count)}


def _with_all(together: int) -> set[str]:
    """Few files that have all parts, or all pairs of parts, that there are in one file."""
    parts = {file: _parts(file, together) for file in FILES}
    chosen: set[str] = set()
    while any(parts.values()):
        best = max(parts, key=lambda file: len(parts[file]))
        chosen.add(best)
        covered = parts.pop(best)
        parts = {file: left - covered for file, left in parts.items()}
    return chosen


FAST = _with_all(1)
SLOW = _with_all(2)


def _param(file: str) -> object:
    marks = [] if file in FAST else [pytest.mark.slow]
    if file not in FAST | SLOW:
        marks.append(pytest.mark.exhaustive)
    if missing := reason(file):
        marks.append(
            pytest.mark.xfail(strict=True, reason=missing, raises=(SlmError, AssertionError))
        )
    return pytest.param(file, id=file.removesuffix("/model.onnx"), marks=marks)


@pytest.mark.parametrize("file", [_param(file) for file in FILES])
def test_a_file_of_the_corpus_computes_what_onnxruntime_computes(file: str) -> None:
    path = corpus_path(*file.split("/"))
    model = import_onnx(path, context=context_of(path))
    rule = rule_of(path)
    sequences = [
        ended(tokens, model.final_token)
        for tokens in token_sequences(model.vocab_size, rule.lengths)
    ]
    source = source_of(model.kind)
    ours = [our_rows(model, tokens) for tokens in sequences]
    wanted = wanted_rows(path, sequences, source, model.outputs, stepwise=rule.stepwise)
    agreement = compare(rule, ours, wanted, model.outputs)
    assert agreement.holds, str(agreement)


@pytest.mark.slow
def test_the_corpus_has_heads_of_every_awkward_size() -> None:
    cells = ("gpt2", "llama", "qwen3", "gemma2", "mistral")
    models = [import_onnx(corpus_path(f"{c}-optimum-past"), context=CONTEXT) for c in cells]
    assert {model.kv[0].head_dim for model in models} == {40, 48, 80, 96, 112}


def test_every_gap_is_of_a_file_that_there_is() -> None:
    for names in GAPS.values():
        assert set(names) <= {file.removesuffix("/model.onnx") for file in FILES}


def test_the_corpus_is_small_and_has_every_family() -> None:
    assert sum(path.stat().st_size for path in ARCHIVES.iterdir()) < MOST_BYTES
    assert set(families()) >= {
        "bart", "bert", "bloom", "distilbert", "flan-t5", "gemma2", "gemma3", "gpt-neox", "gpt2",
        "lfm2-moe", "llama", "minilm", "mistral", "mixtral", "mpnet", "opt", "phi3", "qwen2",
        "qwen2-moe", "qwen3", "qwen3-moe", "roberta", "smollm", "t5", "tinybert",
    }  # fmt: skip
