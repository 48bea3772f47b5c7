"""A decoder whose cache has a fixed size, as operator set 24 writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.verify import Reference
from tests.importer.graph_builder import GraphBuilder, save

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, ROOM = 61, 24, 3, 1, 8, 32
TOKENS = np.random.default_rng(2).integers(0, VOCAB, 20)


def _decoder(folder: Path, mode: str = "linear") -> Path:
    b = GraphBuilder(np.random.default_rng(0))
    x = b.op("Gather", b.constant(b.random.normal(size=(VOCAB, DIM))), "input_ids")
    q, k, v = (b.op("MatMul", x, b.weight(DIM, n * HEAD_DIM)) for n in (HEADS, KV_HEADS, KV_HEADS))
    kept = [
        b.op("TensorScatter", f"past_key_values.0.{name}", new, "write_indices", axis=1, mode=mode)
        for name, new in (("key", k), ("value", v))
    ]
    y = b.op(
        "Attention", q, *kept, "", "", "", "nonpad_kv_seqlen",
        is_causal=1, q_num_heads=HEADS, kv_num_heads=KV_HEADS,
    )  # fmt: skip
    y = b.op("Add", x, b.op("MatMul", y, b.weight(HEADS * HEAD_DIM, DIM)))
    b.nodes.append(helper.make_node("MatMul", [y, b.weight(DIM, VOCAB)], ["logits"]))
    info = helper.make_tensor_value_info
    past = ["batch", ROOM, KV_HEADS * HEAD_DIM]
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        *(info(n, TensorProto.INT64, ["batch"]) for n in ("write_indices", "nonpad_kv_seqlen")),
        *(info(f"past_key_values.0.{n}", TensorProto.FLOAT, past) for n in ("key", "value")),
    ]
    outputs = [info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])]
    model: onnx.ModelProto = b.model(inputs, outputs)
    model.opset_import[0].version, model.ir_version = 24, 11
    return save(model, folder)


def test_what_is_written_into_a_cache_of_fixed_size_is_all_that_is_seen(tmp_path: Path) -> None:
    path = _decoder(tmp_path)
    model = import_onnx(path)
    assert (model.kind, model.kv[0].num_kv_heads) == ("decoder", KV_HEADS)
    for count in (1, 7, len(TOKENS)):
        want = Reference(path).rows(TOKENS[:count])
        got = evaluate(model, TOKENS[:count])
        assert np.abs(got - want).max() <= 2e-4 * np.ptp(want)


def test_a_cache_that_begins_again_at_its_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="a cache that begins again at its end"):
        import_onnx(_decoder(tmp_path, "circular"))
