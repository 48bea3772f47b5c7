"""com.microsoft.SparseAttention: layouts of blocks in compressed rows, for heads in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import slmtvm
from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.reference import evaluate
from slmtvm.verify.reference import Reference
from tests.importer.graph_builder import save
from tests.importer.test_builder_graphs import CONTEXT, TOKENS, Built, write
from tests.importer.test_import_spellings import calls_of

BLOCKS = CONTEXT // 16
ROWS, COLUMNS = np.indices((BLOCKS, BLOCKS))
NEAR = (COLUMNS <= ROWS) & (ROWS - COLUMNS < 2)
STRIDED = (COLUMNS <= ROWS) & ((ROWS == COLUMNS) | (COLUMNS % 2 == 0))
OWN = ROWS == COLUMNS
WHOLE = COLUMNS <= ROWS
IDS = np.random.default_rng(1).integers(0, Built().vocab, TOKENS)


def sparse(*layouts: np.ndarray, **changes: object) -> Built:
    return Built(head_dim=16, layouts=layouts, rotary="", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "built",
    [
        sparse(NEAR, STRIDED),
        sparse(STRIDED, packed=False),
        sparse(NEAR, STRIDED, NEAR, OWN, kv_heads=4),
        Built(head_dim=32, layouts=(NEAR, STRIDED), rotated=32),
    ],
    ids=["two", "separate", "four", "rotated"],
)
def test_each_head_sees_the_blocks_of_its_layout(built: Built, tmp_path: Path) -> None:
    path = save(write(built), tmp_path)
    model = import_onnx(path)
    want = Reference(path).rows(IDS)
    assert np.abs(evaluate(model, IDS) - want).max() <= 1e-4 * np.ptp(want)
    visible = [c for c in calls_of(model, "slm.attention") if "visible" in str(c.attrs["operands"])]
    assert len(visible) == built.layers
    assert model.context == CONTEXT


@pytest.mark.parametrize(
    ("layout", "attrs"), [(OWN, {"chunk": 16}), (WHOLE, {"window": 0, "chunk": 0})]
)
def test_layouts_that_are_a_known_mask_become_it(
    layout: np.ndarray, attrs: dict[str, int], tmp_path: Path
) -> None:
    model = import_onnx(save(write(sparse(layout, layout)), tmp_path))
    for call in calls_of(model, "slm.attention"):
        assert attrs == {name: int(call.attrs[name]) for name in attrs}
        assert "visible" not in str(call.attrs["operands"])


def altered(model: onnx.ModelProto, at: int, change: object) -> onnx.ModelProto:
    """With an input of its attentions, by place, changed."""
    node = next(n for n in model.graph.node if n.op_type == "SparseAttention")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[at])
    values = numpy_helper.to_array(tensor).copy()
    change(values)  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_layouts_that_make_no_sense_are_refused_by_name(tmp_path: Path) -> None:
    def beyond(values: np.ndarray) -> None:
        values[0, 1] = 9

    def backwards(values: np.ndarray) -> None:
        values[0, 1] = 7

    def blind(values: np.ndarray) -> None:
        values[:, 0] = 1

    for at, change, said in ((6, beyond, r"row 1 of layout 0 of its blocks has"),
                             (5, backwards, r"row 1 of layout 0")):  # fmt: skip
        path = save(altered(write(sparse(NEAR, STRIDED)), at, change), tmp_path)
        with pytest.raises(InvalidModelError, match=said) as caught:
            import_onnx(path)
        assert "SparseAttention node" in str(caught.value)
    path = save(altered(write(sparse(STRIDED)), 6, blind), tmp_path)
    with pytest.raises(UnsupportedOpError, match="hides position 0 from itself"):
        import_onnx(path)
    with pytest.raises(UnsupportedOpError, match=str(CONTEXT)):
        import_onnx(save(write(sparse(NEAR)), tmp_path), context=CONTEXT + 1)


@pytest.mark.slow
def test_a_compiled_file_agrees_with_onnxruntime_token_by_token(tmp_path: Path) -> None:
    path = save(write(sparse(NEAR, STRIDED)), tmp_path)
    bundle = slmtvm.compile(path, output=tmp_path / "x.slm", kv="f32")
    assert "skipped" not in bundle.manifest.extra["check"]
    want = Reference(path).rows(IDS)
    with slmtvm.load(bundle.path) as session:
        whole = session.eval_all(IDS)
        session.reset()
        singly = np.stack([session.eval([token]) for token in IDS])
    np.testing.assert_array_equal(whole, singly)
    assert np.abs(whole - want).max() <= 1e-4 * np.ptp(want)
