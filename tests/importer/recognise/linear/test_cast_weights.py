"""Weights that a file restores from integers by Cast, Sub and Mul keep their bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.importer import import_onnx
from slmtvm.ir.params import Params
from tests.importer.graph_builder import save
from tests.importer.graphs import build
from tests.importer.quantized import TINY, check, nibbles
from tests.importer.test_import_spellings import calls_of


def matrices(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The weights of products and the table."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = {n.input[1] for n in model.graph.node if n.op_type == "MatMul"} | {"embedding.weight"}
    return {name: arrays[name] for name in read if name in arrays}


def restored(model: onnx.ModelProto, kind: str, per: str, zero: str, turned: bool = False) -> None:
    """Every matrix as integers with Cast, Sub where there is a ``zero`` point, and Mul.

    per: "output" or "tensor", what has a scale; zero: "" or "number" or as ``per`` has it.
    turned: the scale is the first factor.
    """
    rng = np.random.default_rng(5)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}
    for name, array in matrices(model).items():
        axis = 1 if name == "embedding.weight" else 0  # along which a scale is one
        shape = tuple(1 if a == axis else d for a, d in enumerate(array.shape))
        shape = (1,) if per == "tensor" else shape
        middle = 128 if kind == "UINT8" else 0
        if kind == "INT4":
            tensor, step = nibbles(rng, array.shape, True), 1 / 4
            tensor.name = f"{name}.q"
        else:
            values = rng.integers(-128, 128, array.shape) + middle
            tensor = helper.make_tensor(
                f"{name}.q", getattr(TensorProto, kind), array.shape, values.flatten().tolist()
            )
            step = 1 / 80
        model.graph.initializer.append(tensor)
        size = step * (1 if name == "embedding.weight" else len(array) ** -0.5)
        constants[f"{name}.s"] = (size * (0.5 + rng.random(shape))).astype(np.float32)
        nodes.append(helper.make_node("Cast", [f"{name}.q"], [f"{name}.f"], to=TensorProto.FLOAT))
        levels = f"{name}.f"
        if zero:
            places = () if zero == "number" else shape
            constants[f"{name}.z"] = (middle + rng.integers(-3, 4, places)).astype(np.float32)
            nodes.append(helper.make_node("Sub", [levels, f"{name}.z"], [f"{name}.l"]))
            levels = f"{name}.l"
        factors = [f"{name}.s", levels] if turned else [levels, f"{name}.s"]
        nodes.append(helper.make_node("Mul", factors, [name]))
        (old,) = (t for t in model.graph.initializer if t.name == name)
        model.graph.initializer.remove(old)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    old_nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *old_nodes])
    model.opset_import[0].version, model.ir_version = 21, 10


@pytest.mark.parametrize("turned", [False, True], ids=["", "scale first"])
@pytest.mark.parametrize("zero", ["", "number", "of each"])
@pytest.mark.parametrize("per", ["output", "tensor"])
@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT4"])
def test_integers_with_scales_by_cast_and_mul_stay_integers(kind, per, zero, turned, tmp_path):
    model = build(TINY)
    restored(model, kind, per, zero, turned)
    imported = check(save(model, tmp_path))
    expected = "int4" if kind == "INT4" else "int8"
    for call in (*calls_of(imported, "slm.linear"), *calls_of(imported, "slm.embedding")):
        assert str(call.attrs["format"]) == expected
    assert not [note for note in imported.notes if "expanded" in note]


def widened(model: onnx.ModelProto, change: str) -> None:
    """The head's int8 weight, restored in a way that its format does not hold."""
    restored(model, "INT8", "output", "")
    (mul,) = (n for n in model.graph.node if n.output[0] == "head.weight")
    arrays = {t.name: t for t in model.graph.initializer}
    if change == "divided":
        mul.op_type = "Div"
        scales = numpy_helper.to_array(arrays["head.weight.s"])
        arrays["head.weight.s"].CopyFrom(numpy_helper.from_array(1 / scales, "head.weight.s"))
    else:  # a scale of each weight
        scales = numpy_helper.to_array(arrays["head.weight.s"])
        own = np.broadcast_to(scales, (40, 53)) * (1 + np.arange(40)[:, None] / 40)
        array = own.astype(np.float32)
        arrays["head.weight.s"].CopyFrom(numpy_helper.from_array(array, "head.weight.s"))


@pytest.mark.parametrize("change", ["divided", "of each weight"])
def test_a_weight_that_is_widened_is_noted_with_its_bytes(change, tmp_path):
    model = build(TINY)
    widened(model, change)
    imported = check(save(model, tmp_path))
    assert str(calls_of(imported, "slm.linear")[-1].attrs["format"]) == "f32"
    (note,) = (note for note in imported.notes if "expanded" in note)
    assert "4 times its size (6,360 bytes more)" in note and "'head.weight'" in note


def test_a_table_in_int8_takes_a_quarter_of_its_size_in_float(tmp_path):
    path = save(build(TINY), tmp_path)
    whole = Params(import_onnx(path, context=32).params).nbytes
    model = build(TINY)
    restored(model, "INT8", "output", "")
    assert Params(import_onnx(save(model, tmp_path), context=32).params).nbytes < 0.4 * whole
