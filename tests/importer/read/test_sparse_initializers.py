"""Weights that a file stores as lists of what is not zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.compiler import compile_model
from slmtvm.errors import InvalidModelError
from slmtvm.importer.read.load import load
from slmtvm.importer.read.redact import redact
from slmtvm.inspect import inspect
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build

PRUNED = "head.weight"


def sparse_model(
    edit: Callable[[onnx.SparseTensorProto], None] = lambda _: None, flat: bool = True
) -> tuple[onnx.ModelProto, np.ndarray]:
    """A decoder whose head, two of three zero, is a sparse initializer; the head (k, n)."""
    model = build(Tiny())
    found = next(t for t in model.graph.initializer if t.name == PRUNED)
    dense = numpy_helper.to_array(found).copy()
    dense[np.random.default_rng(0).random(dense.shape) < 2 / 3] = 0
    model.graph.initializer.remove(found)
    places = dense.reshape(-1).nonzero()[0] if flat else np.argwhere(dense)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(dense[dense != 0], PRUNED),
        numpy_helper.from_array(places.astype(np.int64), "places"),
        dense.shape,
    )
    edit(sparse)
    model.graph.sparse_initializer.append(sparse)
    return model, dense


@pytest.mark.parametrize("flat", [True, False])
def test_the_tensor_is_what_the_list_says(flat: bool, tmp_path: Path) -> None:
    model, dense = sparse_model(flat=flat)
    constant = load(save(model, tmp_path)).initializers[PRUNED]
    np.testing.assert_array_equal(constant.values(), dense)


def test_inspect_says_that_the_weight_has_zeros(tmp_path: Path) -> None:
    model, _ = sparse_model()
    (layer,) = [w for w in inspect(save(model, tmp_path)).weights if w.name == PRUNED]
    assert layer.sparsity == "unstructured" and layer.zeros == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.slow
def test_a_compiled_model_computes_what_onnxruntime_does(tmp_path: Path) -> None:
    """``compile_model`` compares its logits with onnxruntime's before it writes anything."""
    model, _ = sparse_model()
    path = save(model, tmp_path)
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    bundle = compile_model(path, ["x86-64-v3"], output=tmp_path / "m.slm", context=32)
    assert bundle.manifest.extra["check"]


def test_a_file_without_its_weights_has_no_values_of_sparse_ones(tmp_path: Path) -> None:
    def grown(sparse: onnx.SparseTensorProto) -> None:
        count = 40_000
        sparse.values.CopyFrom(numpy_helper.from_array(np.full(count, 7.5, "f4"), PRUNED))
        sparse.values.raw_data = np.linspace(7, 8, count, dtype="f4").tobytes()
        sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(count), "places"))

    model, _ = sparse_model(grown)
    (left,) = redact(save(model, tmp_path)).graph.sparse_initializer
    assert not left.values.raw_data and left.indices.raw_data


def ints(sparse: onnx.SparseTensorProto, values: np.ndarray) -> None:
    sparse.indices.CopyFrom(numpy_helper.from_array(values, "places"))


def first(sparse: onnx.SparseTensorProto, place: int) -> None:
    places = numpy_helper.to_array(sparse.indices).copy()
    places[0] = place
    ints(sparse, places)


BROKEN: dict[str, tuple[Callable[[onnx.SparseTensorProto], object], str]] = {
    "an index below 0": (lambda s: first(s, -1), "do not ascend"),
    "an index past the end": (lambda s: first(s, 1 << 40), "do not ascend"),
    "an index that comes twice": (
        lambda s: first(s, int(numpy_helper.to_array(s.indices)[1])), "do not ascend",
    ),
    "fewer indices": (lambda s: ints(s, np.arange(3)), "values have indices of dims [3]"),
    "indices of three axes": (
        lambda s: ints(s, np.zeros((s.values.dims[0], 3), np.int64)), "values have indices of dims",
    ),
    "indices of int32": (
        lambda s: ints(s, numpy_helper.to_array(s.indices).astype(np.int32)), "are int32",
    ),
    "dims below 0": (lambda s: s.dims.__setitem__(0, -4), "impossible dims"),
    "no dims": (lambda s: s.ClearField("dims"), "impossible dims"),
    "dims that no file could fill": (lambda s: s.dims.__setitem__(0, 1 << 60), "more than 4 GB"),
    "no name": (lambda s: setattr(s.values, "name", ""), "unnamed or defined twice"),
    "a name that is taken": (
        lambda s: setattr(s.values, "name", "embedding.weight"), "unnamed or defined twice",
    ),
    "a value too few": (
        lambda s: setattr(s.values, "raw_data", s.values.raw_data[4:]), "bytes where dims",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_list_is_refused_with_its_name(what: str, tmp_path: Path) -> None:
    edit, said = BROKEN[what]
    model, _ = sparse_model(edit)
    with pytest.raises(InvalidModelError) as caught:
        load(save(model, tmp_path))
    assert said in str(caught.value)


def test_an_index_of_several_axes_stays_within_each(tmp_path: Path) -> None:
    def edit(sparse: onnx.SparseTensorProto) -> None:
        places = numpy_helper.to_array(sparse.indices).copy()
        places[3, 1] = 1000
        ints(sparse, places)

    model, _ = sparse_model(edit, flat=False)
    with pytest.raises(InvalidModelError, match="outside of dims"):
        load(save(model, tmp_path))


def test_a_list_of_nothing_is_all_zeros(tmp_path: Path) -> None:
    def edit(sparse: onnx.SparseTensorProto) -> None:
        sparse.values.CopyFrom(helper.make_tensor(PRUNED, TensorProto.FLOAT, [0], []))
        ints(sparse, np.zeros(0, np.int64))

    model, dense = sparse_model(edit)
    constant = load(save(model, tmp_path)).initializers[PRUNED]
    np.testing.assert_array_equal(constant.values(), np.zeros_like(dense))
