"""What a decoded token costs, whatever export the decoder comes from: every weight once.

A graph that an exporter wrote for whole sequences would compute the keys, values and everything
else of all earlier tokens again; the compiler keeps a KV cache for all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from corpus.selection import is_model

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from tests.importer.corpus_gaps import reason
from tests.models.corpus import cells, corpus_path, families, family_of

CONTEXT = 61
CHOSEN_EXPERTS = 2  # of every mixture in the corpus
ENCODERS = ("bert", "distilbert", "minilm", "mpnet", "roberta", "tinybert")
ROUTES = ("dynamo", "dynamo5", "script-past", "optimum-past", "optimum-merged", "builder-int4")


@dataclass(frozen=True)
class Sizes:
    """An encoder-decoder's: its attentions are ``inner`` wide, its FFN has so many matrices."""

    layers: int  # of the encoder, and of the decoder
    hidden: int
    inner: int
    ffn: int  # of the decoder
    source_ffn: int
    ffn_matrices: int
    vocab: int

    def multiply_adds(self, ffn: int) -> int:
        """Of one row, in six matrices of attentions and the FFN of each layer."""
        return self.layers * (6 * self.hidden * self.inner + self.ffn_matrices * self.hidden * ffn)


SOURCES = {
    "bart": Sizes(1, hidden=66, inner=66, ffn=40, source_ffn=56, ffn_matrices=2, vocab=131),
    "t5": Sizes(2, hidden=72, inner=80, ffn=136, source_ffn=136, ffn_matrices=2, vocab=131),
    "flan-t5": Sizes(1, hidden=80, inner=72, ffn=104, source_ffn=104, ffn_matrices=3, vocab=131),
}
SOURCE_ROUTES = ("dynamo", "script", "optimum", "optimum-past", "optimum-merged")
SOURCE_TOKENS = 16


def _decoders() -> list[str]:
    names = [f for f in families() if f not in (*ENCODERS, *SOURCES)]
    wanted = [f"{family}-{route}" for family in names for route in ROUTES]
    return [cell for cell in wanted if cell in cells() and not reason(f"{cell}/model.onnx")]


def _with_sources() -> list[str]:
    """The decoders' files of all encoder-decoders."""
    wanted = [f"{family}-{route}" for family in SOURCES for route in SOURCE_ROUTES]
    names = [(cell, name) for cell in wanted for name in cells().get(cell, ()) if is_model(name)]
    return [f"{cell}/{name}" for cell, name in names if not name.startswith("encoder")]


def _total(plan: Plan, name: str, field: str) -> int:
    (function,) = [f for f in plan.functions if (f.name, f.rows) == (name, 1)]
    return sum(getattr(plan.kernels[step.kernel].work, field) for step in function.steps)


def _weights_used(model: CanonicalModel) -> int:
    """Elements of all weights that one token is multiplied by: of all experts only the chosen."""
    used = [la.shape for la in model.layers if la.kind in ("linear", "convolution")]
    chosen = [(CHOSEN_EXPERTS, *la.shape[1:]) for la in model.layers if la.kind == "experts"]
    return sum(math.prod(shape) for shape in (*used, *chosen))


def _cells() -> list[object]:
    """The first of each family and of each route, and, exhaustively, all."""
    params, seen = [], set()
    for cell in _decoders():
        family = family_of(cell)
        parts = {family, cell.removeprefix(f"{family}-")}
        params.append(pytest.param(cell, marks=[] if parts - seen else pytest.mark.exhaustive))
        seen |= parts
    return params


@pytest.mark.slow
@pytest.mark.parametrize("cell", _cells())
def test_a_decoded_token_is_multiplied_by_every_weight_once(cell: str) -> None:
    model = import_onnx(corpus_path(cell), context=CONTEXT)
    plan = build_plan(lower(fuse(model), Target.load("x86-64-v3"), "float32"), {})
    done = _total(plan, "body", "multiply_adds") + _total(plan, "head", "multiply_adds")
    assert done == _weights_used(model)
    kept = sum(spec.num_kv_heads * spec.head_dim for spec in model.kv)
    assert _total(plan, "body", "context_bytes") == 2 * 4 * kept
    queried = sum(model.num_heads * spec.head_dim for spec in model.kv)
    assert _total(plan, "body", "context_multiply_adds") == 2 * queried


def _by_matrices(plan: Plan, name: str, rows: int) -> int:
    """Multiply-adds of a function's matrices, those of attentions' scores left out."""
    (function,) = [f for f in plan.functions if (f.name, f.rows) == (name, rows)]
    kernels = [plan.kernels[s.kernel] for s in function.steps if "attention" not in s.kernel]
    return sum(kernel.work.multiply_adds for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("file", _with_sources())
def test_keys_and_values_of_a_source_are_computed_once_and_not_for_each_token(file: str) -> None:
    sizes = SOURCES[family_of(file.split("/")[0])]
    model = import_onnx(corpus_path(*file.split("/")), context=CONTEXT)
    plan = build_plan(lower(fuse(model), Target.load("x86-64-v3"), "float32"), {})
    # Query, key, value and output of the attention to itself; query and output of the other one.
    assert _by_matrices(plan, "body", 1) == sizes.multiply_adds(sizes.ffn)
    assert _by_matrices(plan, "head", 1) == sizes.hidden * sizes.vocab
    # The encoder, and the keys and values that each of the decoder's layers reads of it.
    source = SOURCE_TOKENS * sizes.multiply_adds(sizes.source_ffn)
    assert _by_matrices(plan, "source", SOURCE_TOKENS) == source
    kept = sum(spec.num_kv_heads * spec.head_dim for spec in model.kv)
    assert kept == sizes.layers * sizes.inner
    assert _total(plan, "body", "context_bytes") == 2 * 4 * kept
