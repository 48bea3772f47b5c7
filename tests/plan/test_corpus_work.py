"""What a decoded token costs, whatever export the decoder comes from: every weight once.

A graph that an exporter wrote for whole sequences would compute the keys, values and everything
else of all earlier tokens again; the compiler keeps a KV cache for all of them.
"""

from __future__ import annotations

import math

import pytest

from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from tests.importer.corpus_gaps import reason
from tests.models.corpus import cells, corpus_path, families

CONTEXT = 61
CHOSEN_EXPERTS = 2  # of every mixture in the corpus
ENCODERS = ("bert", "distilbert", "minilm", "mpnet", "roberta", "tinybert")
SOURCES = ("t5", "flan-t5")  # their decoders are tested with encoder-decoders
ROUTES = ("dynamo", "dynamo5", "script-past", "optimum-past", "optimum-merged", "builder-int4")


def _decoders() -> list[str]:
    names = [f for f in families() if f not in (*ENCODERS, *SOURCES)]
    wanted = [f"{family}-{route}" for family in names for route in ROUTES]
    return [cell for cell in wanted if cell in cells() and not reason(f"{cell}/model.onnx")]


def _total(plan: Plan, name: str, field: str) -> int:
    (function,) = [f for f in plan.functions if (f.name, f.rows) == (name, 1)]
    return sum(getattr(plan.kernels[step.kernel].work, field) for step in function.steps)


def _weights_used(model: CanonicalModel) -> int:
    """Elements of all weights that one token is multiplied by: of all experts only the chosen."""
    used = [la.shape for la in model.layers if la.kind in ("linear", "convolution")]
    chosen = [(CHOSEN_EXPERTS, *la.shape[1:]) for la in model.layers if la.kind == "experts"]
    return sum(math.prod(shape) for shape in (*used, *chosen))


@pytest.mark.slow
@pytest.mark.parametrize("cell", _decoders())
def test_a_decoded_token_is_multiplied_by_every_weight_once(cell: str) -> None:
    model = import_onnx(corpus_path(cell), context=CONTEXT)
    plan = build_plan(lower(fuse(model), Target.load("x86-64-v3"), "float32"), {})
    done = _total(plan, "body", "multiply_adds") + _total(plan, "head", "multiply_adds")
    assert done == _weights_used(model)
    kept = sum(spec.num_kv_heads * spec.head_dim for spec in model.kv)
    assert _total(plan, "body", "context_bytes") == 2 * 4 * kept
    queried = sum(model.num_heads * spec.head_dim for spec in model.kv)
    assert _total(plan, "body", "context_multiply_adds") == 2 * queried
