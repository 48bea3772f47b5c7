"""Files that must be refused, each with an error that names the file, the node and the fault."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.load import load
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build

Edit = Callable[[onnx.ModelProto], None]


def refused(path: Path, kind: type[SlmError]) -> str:
    """The message of the error that importing ``path`` ends in."""
    with pytest.raises(kind) as caught:
        import_onnx(path, context=48)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def edited(tmp_path: Path, edit: Edit, tiny: Tiny | None = None) -> Path:
    model = build(tiny or Tiny())
    edit(model)
    return save(model, tmp_path)


def node(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == kind)


def weight(model: onnx.ModelProto, name: str = "embedding.weight") -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am a text file\n", b"\x08\x09", bytes(range(256)) * 40, b"\0" * 1000]
)
def test_a_file_that_is_not_onnx(data, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    assert "ONNX" in refused(path, InvalidModelError)


def test_a_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "nothing.onnx", InvalidModelError)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(part, tmp_path):
    path = save(build(Tiny()), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path, InvalidModelError)


def test_a_cycle_names_a_node_on_it(tmp_path):
    def edit(model):
        first = node(model, "Pow")
        first.input[0] = model.graph.node[-2].output[0]

    assert "cycle" in refused(edited(tmp_path, edit), InvalidModelError)


def test_a_dangling_edge_names_the_node_and_the_value(tmp_path):
    def edit(model):
        node(model, "Softmax").input[0] = "nowhere"

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "Softmax node" in message
    assert "'nowhere' is defined nowhere" in message


def test_an_output_that_nothing_defines(tmp_path):
    def edit(model):
        model.graph.node[-1].output[0] = "other"

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "output 'logits' is defined nowhere" in message


def test_a_value_defined_twice_names_the_second_node(tmp_path):
    def edit(model):
        node(model, "Softmax").output[0] = node(model, "Pow").output[0]

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "Softmax node" in message
    assert "defined twice" in message


def test_nodes_in_any_order_are_sorted(tmp_path):
    def edit(model):
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    assert import_onnx(edited(tmp_path, edit), context=48).kind == "decoder"


def test_all_unknown_operators_are_listed_with_their_nodes(tmp_path):
    def edit(model):
        node(model, "Softmax").op_type = "Softmux"
        a, b = [n for n in model.graph.node if n.op_type == "Sqrt"][:2]
        a.op_type = b.op_type = "Sqroot"
        node(model, "Sigmoid").domain = "com.microsoft"

    message = refused(edited(tmp_path, edit), UnsupportedOpError)
    assert "ai.onnx.Softmux (version 18): 'Softmax_" in message
    assert "ai.onnx.Sqroot (version 18): 'Sqrt_" in message
    assert message.count("'Sqrt_") == 2
    assert "com.microsoft.Sigmoid (version 1)" in message


def test_an_operator_set_that_is_not_imported(tmp_path):
    def edit(model):
        node(model, "Softmax").domain = "made.up"

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "'made.up', which the model does not import" in message


def test_the_operator_set_of_onnxruntime_may_be_missing(tmp_path):
    def edit(model):
        node(model, "Sigmoid").op_type = "QuickGelu"
        node(model, "QuickGelu").domain = "com.microsoft"
        del model.opset_import[1:]

    assert import_onnx(edited(tmp_path, edit), context=48).kind == "decoder"


def test_a_missing_or_surplus_input_of_a_node(tmp_path):
    def edit(model):
        del node(model, "MatMul").input[1]

    assert "has 1 inputs" in refused(edited(tmp_path, edit), InvalidModelError)


def test_an_attribute_of_the_wrong_type(tmp_path):
    def edit(model):
        target = node(model, "Softmax")
        del target.attribute[:]
        target.attribute.append(helper.make_attribute("axis", 1.5))

    assert "'axis'" in refused(edited(tmp_path, edit), InvalidModelError)


def test_shapes_that_contradict_each_other_name_the_node_and_the_shapes(tmp_path):
    def edit(model):
        tensor = weight(model, "head.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.ones((25, 53), np.float32), "head.weight"))

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "MatMul node" in message
    assert "[25, 53]" in message


def test_an_output_declared_with_other_dimensions(tmp_path):
    def edit(model):
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 54

    assert "declared with dimensions" in refused(edited(tmp_path, edit), InvalidModelError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_weights_that_are_not_finite_name_the_weight(value, name, tmp_path):
    def edit(model):
        array = numpy_helper.to_array(weight(model, name)).copy()
        array[3, 2] = value
        weight(model, name).CopyFrom(numpy_helper.from_array(array, name))

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert f"weight '{name}'" in message
    assert "NaN or infinite" in message


def test_a_tensor_with_less_data_than_its_dims_need(tmp_path):
    def edit(model):
        weight(model).raw_data = weight(model).raw_data[:-4]

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "'embedding.weight'" in message
    assert "bytes" in message


def test_numbers_of_two_bits_are_unsupported_and_not_damaged(tmp_path):
    def edit(model):
        weight(model).data_type = TensorProto.INT2
        weight(model).raw_data = bytes(53 * 24 // 4)

    assert "tensors of INT2 are not supported" in refused(
        edited(tmp_path, edit), UnsupportedOpError
    )


@pytest.mark.parametrize("dims", [(1 << 40, 1 << 40), (-1, 24), (1 << 62, 4), (53, 24, 1 << 33)])
def test_dims_that_no_file_could_fill(dims, tmp_path):
    def edit(model):
        del weight(model).dims[:]
        weight(model).dims.extend(dims)

    assert "'embedding.weight'" in refused(edited(tmp_path, edit), InvalidModelError)


def test_more_than_four_gigabytes_of_constants(tmp_path):
    """Sparse files: they claim the bytes and occupy none."""
    big = tmp_path / "big.bin"
    with big.open("wb") as file:
        file.truncate(5 << 30)

    def edit(model):
        for i in range(5):
            tensor = model.graph.initializer.add()
            tensor.name, tensor.data_type = f"big{i}", TensorProto.FLOAT
            tensor.dims.extend([1 << 28])
            external(tensor, "big.bin", 0, 1 << 30)

    assert "more than 4 GB" in refused(edited(tmp_path, edit), InvalidModelError)


@pytest.mark.parametrize("size", [1 << 24, 1 << 40, (1 << 63) - 1])
def test_a_constant_that_is_computed_out_of_all_proportion(size, tmp_path):
    def edit(model):
        dims = numpy_helper.from_array(np.array([size, 3], np.int64), "dims")
        model.graph.initializer.append(dims)
        fill = helper.make_node("ConstantOfShape", ["dims"], ["huge"], name="fill")
        model.graph.node.insert(0, fill)

    message = refused(edited(tmp_path, edit), InvalidModelError)
    assert "ConstantOfShape node 'fill'" in message


def external(tensor: onnx.TensorProto, location: str, offset: object, length: object) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def moved_out(tmp_path: Path, location: str, offset: object = 0, length: object = None) -> Path:
    """The model with its embedding in another file, or said to be there."""

    def edit(model):
        tensor = weight(model)
        size = len(tensor.raw_data)
        external(tensor, location, offset, size if length is None else length)

    return edited(tmp_path, edit)


def test_external_data_inside_the_folder_is_read(tmp_path):
    model = build(Tiny())
    data = weight(model).raw_data
    inline = import_onnx(save(model, tmp_path, "inline.onnx"), context=48)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(b"\0" * 64 + data)
    outside = import_onnx(moved_out(tmp_path, "sub/weights.bin", 64), context=48)
    name = "embedding.weight"
    assert (inline.params[name] == outside.params[name]).all()
    assert isinstance(outside.params[name].base, np.memmap | np.ndarray)


@pytest.mark.parametrize(
    "location", ["../outside.bin", "sub/../../outside.bin", "/etc/hostname", "", "a\0b"]
)
def test_an_external_path_that_leaves_the_folder(location, tmp_path):
    (tmp_path / "outside.bin").write_bytes(bytes(53 * 24 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    message = refused(moved_out(folder, location), InvalidModelError)
    assert "leaves the model's folder" in message
    assert "'embedding.weight'" in message


def test_a_symlink_that_leaves_the_folder(tmp_path):
    (tmp_path / "outside.bin").write_bytes(bytes(53 * 24 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "outside.bin", folder / "weights.bin")
    message = refused(moved_out(folder, "weights.bin"), InvalidModelError)
    assert "leaves the model's folder" in message


@pytest.mark.parametrize(
    ("offset", "length", "fault"),
    [
        (4, None, "past the end"),
        (1 << 50, None, "past the end"),
        (-4, None, "not a number"),
        (0, 7, "dims need"),
        ("x", None, "not a number"),
        ("9" * 40, None, "not a number"),
    ],
)
def test_an_external_range_outside_the_file(offset, length, fault, tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(53 * 24 * 4))
    assert fault in refused(moved_out(tmp_path, "weights.bin", offset, length), InvalidModelError)


def test_an_external_file_that_is_missing_or_no_file(tmp_path):
    assert "cannot be read" in refused(moved_out(tmp_path, "none.bin"), InvalidModelError)
    os.mkfifo(tmp_path / "pipe.bin")
    assert "is not a file" in refused(moved_out(tmp_path, "pipe.bin"), InvalidModelError)


def test_inputs_without_a_known_role_are_named(tmp_path):
    def edit(model):
        extra = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, 8, 8])
        model.graph.input.append(extra)

    message = refused(edited(tmp_path, edit), UnsupportedOpError)
    assert "'pixel_values' [1, 3, 8, 8]" in message


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (0, "'input_ids' has a fixed batch of 16; export it with a dynamic one"),
        (1, "the inputs have a fixed length of 16, and 48 tokens are asked for"),
    ],
)
def test_inputs_of_a_fixed_size_are_named(axis, said, tmp_path):
    def edit(model):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 16

    assert said in refused(edited(tmp_path, edit), UnsupportedOpError)


def test_mixing_positions_outside_attention_names_the_node(tmp_path):
    def edit(model):
        head = model.graph.node[-1]
        mean = helper.make_node(
            "ReduceMean", [head.input[0], "axes"], ["pooled"], name="pool", keepdims=1
        )
        both = helper.make_node("Add", [head.input[0], "pooled"], ["mixed"], name="both")
        axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
        model.graph.initializer.append(axes)
        head.input[0] = "mixed"
        model.graph.node.extend([mean, both])

    message = refused(edited(tmp_path, edit), UnsupportedOpError)
    assert "ReduceMean node 'pool': combines different positions" in message


def test_dropout_in_training_mode_is_refused_and_else_ignored(tmp_path):
    def dropping(training: bool) -> Edit:
        def edit(model):
            for name, value in (("ratio", np.float32(0.1)), ("training", np.bool_(training))):
                model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
            head = model.graph.node[-1]
            inputs = [head.input[0], "ratio", "training"]
            model.graph.node.append(helper.make_node("Dropout", inputs, ["kept"], name="drop"))
            head.input[0] = "kept"

        return edit

    assert import_onnx(edited(tmp_path, dropping(False)), context=48).kind == "decoder"
    message = refused(edited(tmp_path, dropping(True)), UnsupportedOpError)
    assert "Dropout node 'drop'" in message
    assert "evaluation mode" in message


def local_function(body_domain: str = "") -> onnx.FunctionProto:
    node = helper.make_node("Sigmoid" if not body_domain else "Gate", ["x"], ["s"], name="inner",
                            domain=body_domain)  # fmt: skip
    product = helper.make_node("Mul", ["x", "s"], ["y"], name="outer")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_function("local", "Gate", ["x"], ["y"], [node, product], opsets)


def with_function(model: onnx.ModelProto, function: onnx.FunctionProto) -> None:
    """Every Sigmoid becomes a call of the local function, which computes silu instead."""
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    for target in model.graph.node:
        if target.op_type == "Relu":
            target.op_type, target.domain = "Gate", "local"


def test_local_functions_are_inlined(tmp_path):
    path = edited(tmp_path, lambda m: with_function(m, local_function()), Tiny(activation="relu"))
    model = import_onnx(path, context=48)
    (block,) = model.module["main"].body.blocks
    names = [b.value.op.name for b in block.bindings if hasattr(b.value, "op")]
    assert names.count("relax.nn.silu") == 1
    assert "relax.nn.relu" not in names


def test_a_function_that_calls_itself(tmp_path):
    tiny = Tiny(activation="relu")
    path = edited(tmp_path, lambda m: with_function(m, local_function("local")), tiny)
    assert "calls itself" in refused(path, InvalidModelError)


@pytest.mark.slow
def test_functions_that_multiply_beyond_measure(tmp_path):
    def edit(model):
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        for level in range(40):
            inner, domain = (f"F{level - 1}", "local") if level else ("Relu", "")
            body = [
                helper.make_node(inner, ["x"], ["a"], domain=domain),
                helper.make_node(inner, ["a"], ["y"], domain=domain),
            ]
            model.functions.append(
                helper.make_function("local", f"F{level}", ["x"], ["y"], body, opsets)
            )
        model.opset_import.append(helper.make_opsetid("local", 1))
        target = node(model, "Relu")
        target.op_type, target.domain = "F39", "local"

    path = edited(tmp_path, edit, Tiny(activation="relu"))
    assert "expand to over" in refused(path, InvalidModelError)


def test_loading_keeps_weights_as_views_of_the_file_s_bytes(tmp_path):
    graph = load(save(build(Tiny()), tmp_path))
    assert all(not c.stored.flags.owndata for c in graph.initializers.values() if c.stored.size > 9)
