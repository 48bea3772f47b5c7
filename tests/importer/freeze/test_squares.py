"""Attention over pieces of a sequence, as transformers' Longformer exports it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from slmtvm.verify.reference import Reference
from tests.importer.graph_builder import GraphBuilder, save
from tests.importer.graphs import Tiny, build
from tests.importer.test_import_spellings import calls_of
from tests.models.corpus import corpus_path

LENGTH = 48
IDS = np.random.default_rng(2).integers(3, 143, LENGTH)


def longformer() -> Path:
    return corpus_path("longformer-script-fixed")


@cache
def imported() -> CanonicalModel:
    return import_onnx(longformer(), mask="arbitrary")


def agrees(path: Path, model: CanonicalModel, ids: np.ndarray, mask: np.ndarray | None) -> bool:
    seen = slice(None) if mask is None else mask
    want = Reference(path).rows(ids, mask=mask)[seen]
    got = evaluate(model, ids, mask=mask)[seen]
    return bool(np.abs(got - want).max() <= 1e-5 * np.ptp(want))


def test_users_are_told_what_shorter_sequences_are() -> None:
    assert any("holds its length, 48 tokens: shorter" in note for note in imported().notes)


def test_pieces_become_attention_that_sees_a_window() -> None:
    """Windows of 8 and 12: so many of its neighbours, half of them on each side."""
    model = imported()
    assert (model.kind, model.context, model.mask) == ("encoder", LENGTH, "keys")
    assert len(calls_of(model, "slm.attention")) == 2
    tables = [table for name, table in model.params.items() if name.startswith("attention.")]
    behind = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    seen = [
        np.unpackbits(table, axis=-1)[0, :, :LENGTH] != 0
        if table.dtype == np.uint8
        else table[0, LENGTH - 1 - behind] > -1e8
        for table in tables
    ]
    assert sorted(int(s.sum()) for s in seen) == [
        int((np.abs(behind) <= side).sum()) for side in (4, 6)
    ]
    assert all((s == (np.abs(behind) <= s[0].sum() - 1)).all() for s in seen)


@pytest.mark.parametrize(
    "length", [2, LENGTH, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 13, 24, 47))]
)
def test_rows_are_those_of_onnxruntime_at_every_length(length: int) -> None:
    """Shorter sequences are padded and hidden in the file."""
    assert agrees(longformer(), imported(), IDS[:length], None)


@pytest.mark.parametrize(
    "hidden",
    ["left", "windows", *(pytest.param(h, marks=pytest.mark.slow) for h in ("right", "holes"))],
)
def test_rows_are_those_of_onnxruntime_under_masks(hidden: str) -> None:
    mask = np.ones(LENGTH, bool)
    if hidden == "holes":
        mask = np.random.default_rng(3).random(LENGTH) < 0.7
    elif hidden == "windows":  # more hidden ones together than the windows are wide
        mask[10:30] = False
    else:
        mask[: 9 if hidden == "left" else 0] = mask[LENGTH - (hidden == "right") * 9 :] = False
    assert agrees(longformer(), imported(), IDS, mask)


def constants(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The small whole numbers of the first layer's attention: where pieces begin and end."""
    return [
        node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant"
        and "layer.0/attention/self" in node.output[0]
        and node.attribute[0].t.data_type == onnx.TensorProto.INT64
    ]


def altered(seed: int) -> onnx.ModelProto:
    """The file with one of those numbers changed by one."""
    model = onnx.load(longformer())
    random = np.random.default_rng(seed)
    tensors = constants(model)
    tensor = tensors[random.integers(len(tensors))]
    values = numpy_helper.to_array(tensor).copy()
    place = random.integers(values.size) if values.ndim else 0
    flat = values.reshape(-1)
    flat[place] += -1 if flat[place] > 1 << 40 else random.choice([-1, 1])
    tensor.CopyFrom(numpy_helper.from_array(flat.reshape(values.shape), tensor.name))
    return model


SEEDS = [pytest.param(range(i, i + 2), marks=pytest.mark.slow if i < 2 else pytest.mark.exhaustive)
         for i in range(0, 12, 2)]  # fmt: skip


def import_or_none(path: Path) -> CanonicalModel | None:
    try:
        return import_onnx(path)
    except SlmError:
        return None


def takes(path: Path) -> bool:
    try:
        return bool(np.isfinite(Reference(path).rows(IDS)).all())
    except SlmError:
        return False


@pytest.mark.parametrize("seeds", SEEDS)
def test_pieces_that_lie_elsewhere_are_right_or_refused(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        path = save(altered(seed), tmp_path, f"{seed}.onnx")
        model = import_or_none(path)
        if model is not None and takes(path):
            assert agrees(path, model, IDS, None), seed


def linformer(b: GraphBuilder, x: str, hidden: int) -> str:
    """Eight keys and values, each a mean of all that there are."""
    ones = b.op("Mul", b.op("Transpose", x, perm=[0, 2, 1]), b.constant(0.0))
    table = b.op("Add", b.op("ReduceMax", ones, b.ints(1), keepdims=1), b.near(0.3, 1, 8, 1))
    keys = b.op("MatMul", table, x)
    scores = b.op("MatMul", x, b.op("Transpose", keys, perm=[0, 2, 1]))
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), keys)


def performer(b: GraphBuilder, x: str, hidden: int) -> str:
    """Features in place of a softmax: one matrix of all keys and values."""
    features = b.op("Relu", b.op("MatMul", x, b.weight(hidden, 17)))
    sums = b.op("MatMul", b.op("Transpose", features, perm=[0, 2, 1]), x)
    return b.op("MatMul", features, sums)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (linformer, r"MatMul node 'MatMul_\d+': (scores of shape .* along the sequence|combines)"),
        (performer, r"MatMul node 'MatMul_\d+': .* does not come from a softmax"),
    ],
)
def test_attention_of_low_rank_is_refused_by_name(
    block: Callable[[GraphBuilder, str, int], str], said: str, tmp_path: Path
) -> None:
    path = save(build(Tiny(mask="none", block=block)), tmp_path)
    with pytest.raises(UnsupportedOpError, match=said):
        import_onnx(path, context=32)


def test_padding_that_is_no_part_of_an_attention_is_refused_by_name(tmp_path: Path) -> None:
    model = build(Tiny())
    index = next(i for i, n in enumerate(model.graph.node) if n.op_type == "MatMul")
    (padded,) = model.graph.node[index].output
    node = onnx.helper.make_node("Pad", [padded, "pads"], ["wide"], name="chunks/Pad")
    model.graph.node.insert(index + 1, node)
    for other in list(model.graph.node)[index + 2 :]:
        for place, name in enumerate(other.input):
            other.input[place] = "wide" if name == padded else name
    pads = numpy_helper.from_array(np.zeros(6, np.int64), "pads")
    model.graph.initializer.append(pads)
    with pytest.raises(UnsupportedOpError, match=r"'chunks/Pad': pads .* is another function"):
        import_onnx(save(model, tmp_path), context=32)
