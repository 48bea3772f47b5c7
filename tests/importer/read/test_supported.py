"""Which operators, operator sets and attributes are taken."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.importer.operators import MAX_OPSET
from slmtvm.importer.read.defaults import is_default
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build

NEWEST = max(MAX_OPSET, onnx.defs.onnx_opset_version())


def at_version(version: int, folder: Path, *, domain: str = "") -> Path:
    model = build(Tiny())
    for entry in model.opset_import:
        if entry.domain == domain:
            entry.version = version
    if domain:
        silu = next(n for n in model.graph.node if n.op_type == "Sigmoid")
        silu.op_type, silu.domain = "QuickGelu", domain
    return save(model, folder)


@pytest.mark.parametrize("version", range(18, NEWEST + 1))
def test_a_decoder_imports_at_every_operator_set_that_is_known(version, tmp_path):
    assert import_onnx(at_version(version, tmp_path), context=32).kind == "decoder"


@pytest.mark.parametrize(("domain", "version", "known"), [
    ("", NEWEST + 1, NEWEST), ("", 99, NEWEST), ("com.microsoft", 2, 1),
])  # fmt: skip
def test_a_newer_operator_set_is_one_error_that_names_it(domain, version, known, tmp_path):
    with pytest.raises(UnsupportedOpError) as caught:
        import_onnx(at_version(version, tmp_path, domain=domain), context=32)
    title = f"operator set {version} of {domain or 'ai.onnx'} is newer than what is known"
    assert f"{title}, which is {known};" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [1, 6, -1])
def test_an_older_operator_set_is_one_error_that_names_it(version, tmp_path):
    with pytest.raises(UnsupportedOpError, match=f"operator set {version} of ai.onnx is older"):
        import_onnx(at_version(version, tmp_path), context=32)


def test_a_definition_that_changed_since_it_was_checked_is_named(tmp_path, monkeypatch):
    """ReduceMean of 18 where the table was checked against 17."""
    monkeypatch.setattr("slmtvm.importer.read.supported.MAX_OPSET", 17)
    with pytest.raises(UnsupportedOpError) as caught:
        import_onnx(at_version(18, tmp_path), context=32)
    assert "ai.onnx.ReduceMean (as version 18 changed it): 'ReduceMean_" in str(caught.value)
    assert "Sqrt" not in str(caught.value)


def with_attribute(name: str, value: object, folder: Path) -> Path:
    """A decoder of operator set 18 with one more attribute at a Cast."""
    model = build(Tiny(rope="rotate_half"))
    target = next(n for n in model.graph.node if n.op_type == "Cast")
    target.attribute.append(helper.make_attribute(name, value))
    return save(model, folder)


@pytest.mark.parametrize(("name", "value"), [
    ("sharpness", 0), ("round_mode", "down"), ("round_mode", 0), ("to", 1.0),
])  # fmt: skip
def test_an_attribute_that_an_operator_lacks_is_named(name, value, tmp_path):
    with pytest.raises(InvalidModelError, match=f"Cast node .* attribute '{name}'"):
        import_onnx(with_attribute(name, value, tmp_path), context=32)


def test_an_unknown_attribute_at_its_default_value_changes_nothing(tmp_path):
    """Cast has a round_mode since operator set 24, "up" by default."""
    path = with_attribute("round_mode", "up", tmp_path)
    assert import_onnx(path, context=32).kind == "decoder"


@pytest.mark.parametrize(("domain", "op", "version", "name", "value", "expected"), [
    ("", "Attention", 23, "left_window_size", -1, True),  # since 25
    ("", "Attention", 23, "left_window_size", 4, False),
    ("", "Attention", 23, "left_window_size", -1.0, False),
    ("", "LRN", 13, "beta", 0.75, True),
    ("", "Dropout", 7, "is_test", 0, False),  # until 6: there 0 was training
    ("", "Softmax", 13, "no_such", 0, False),
    ("", "NoSuch", 13, "axis", 0, False),
    ("com.microsoft", "MatMulNBits", 1, "accuracy_level", 0, True),  # onnxruntime's own
    ("com.microsoft", "MatMulNBits", 1, "accuracy_level", 4, False),
    ("com.microsoft", "MatMulNBits", 1, "bits", 4, True),
    ("com.microsoft", "MatMulNBits", 1, "N", 0, False),  # has no default
])  # fmt: skip
def test_a_default_is_known_from_onnx_and_onnxruntime(domain, op, version, name, value, expected):
    if not onnx.defs.has("Attention", 25, "") and op == "Attention":
        pytest.skip("this onnx does not know the attribute")
    assert is_default(domain, op, version, helper.make_attribute(name, value)) is expected
