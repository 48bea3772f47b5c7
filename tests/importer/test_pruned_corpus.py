"""Pruned exports by every route: patterns are seen, and what they compute is onnxruntime's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from corpus.agreement import compare, rule_of
from corpus.check import CONTEXT
from corpus.inputs import source_of, token_sequences
from corpus.oracle import wanted_rows
from corpus.outputs import our_rows
from onnx import TensorProto, numpy_helper

from slmtvm.importer import import_onnx
from tests.models.corpus import corpus_path

ROUTES = (
    "llama-dynamo", "llama-dynamo-past", "llama-script-masked", "llama-optimum",
    "llama-optimum-past", "llama-optimum-merged", "llama-builder-fp32", "minilm-dynamo",
    "minilm-optimum", "minilm-script-masked",
)  # fmt: skip
SMALLEST = 256  # weights of a matrix


def prune(source: Path, target: Path, *, keep: Sequence[str] = ()) -> list[str]:
    """Write ``source`` with the two smallest of every four weights of an output at zero; in the
    matrices of ``keep`` one is left that should go. The matrices, in order."""
    model = onnx.load(source)
    multiplied = {n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm")}
    found = []
    for tensor in model.graph.initializer:
        dims = list(tensor.dims)
        plain = tensor.data_type == TensorProto.FLOAT and len(dims) == 2
        if tensor.name not in multiplied or not plain or np.prod(dims) < SMALLEST or dims[0] % 4:
            continue
        fours = np.ascontiguousarray(numpy_helper.to_array(tensor).T).reshape(dims[1], -1, 4)
        least = np.argsort(np.abs(fours), axis=2)[:, :, :2]
        left = fours[5, 3, least[5, 3, 1]]
        np.put_along_axis(fours, least, 0, axis=2)
        if tensor.name in keep:
            fours[5, 3, least[5, 3, 1]] = left or 0.5
        value = np.ascontiguousarray(fours.reshape(dims[1], dims[0]).T)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        found.append(tensor.name)
    onnx.save(model, target)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cell", ROUTES)
def test_a_pruned_export_keeps_its_pattern_but_where_it_is_broken(
    cell: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    names = prune(corpus_path(cell), path)
    assert len(names) >= 8
    prune(corpus_path(cell), path, keep=names[3:4])
    model = import_onnx(path, context=CONTEXT)
    patterns = [layer.sparsity for layer in model.layers if layer.kind == "linear"]
    # One matrix of the file may hold several layers; a tied head is no plain matrix of it.
    assert patterns.count("2:4") >= len(names) - 1, patterns
    assert patterns.count("unstructured") == 1, patterns
    rule = rule_of(path)
    sequences = token_sequences(model.vocab_size, rule.lengths)
    ours = [our_rows(model, tokens) for tokens in sequences]
    source = source_of(model.kind)
    wanted = wanted_rows(path, sequences, source, model.outputs, stepwise=rule.stepwise)
    agreement = compare(rule, ours, wanted, model.outputs)
    assert agreement.holds, str(agreement)
