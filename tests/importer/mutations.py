"""Damaged ONNX files: bytes flipped at random, and graphs edited at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

_ODD_NUMBERS = (-(1 << 63), -(1 << 31), -2, -1, 0, 1, 2, 3, 7, 255, 1 << 20, 1 << 40, (1 << 63) - 1)
_ODD_FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece cut out, doubled, or the end lost."""
    damaged = bytearray(data)
    choice = rng.random()
    if choice < 0.6:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    elif choice < 0.75:
        del damaged[rng.randrange(len(damaged)) :]
    elif choice < 0.9:
        start = rng.randrange(len(damaged))
        del damaged[start : start + rng.choice((1, 4, 100))]
    else:
        start = rng.randrange(len(damaged))
        damaged[start:start] = damaged[start : start + rng.choice((1, 4, 100))]
    return bytes(damaged)


def edit_graph(model: ModelProto, rng: random.Random) -> ModelProto:
    """A copy of ``model`` with one to three random edits."""
    damaged = ModelProto()
    damaged.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_EDITS)(damaged, rng)
    return damaged


def _node(model: ModelProto, rng: random.Random) -> NodeProto:
    return rng.choice(model.graph.node)


def _some_name(model: ModelProto, rng: random.Random) -> str:
    names = [o for n in model.graph.node for o in n.output]
    names += [i.name for i in model.graph.initializer] + ["", "nowhere", "input_ids"]
    return rng.choice(names)


def _rewire(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = _some_name(model, rng)


def _rename_output(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.output[rng.randrange(len(node.output))] = _some_name(model, rng)


def _drop_node(model: ModelProto, rng: random.Random) -> None:
    if len(model.graph.node) > 1:
        del model.graph.node[rng.randrange(len(model.graph.node))]


def _swap_operators(model: ModelProto, rng: random.Random) -> None:
    a, b = _node(model, rng), _node(model, rng)
    a.op_type, b.op_type = b.op_type, a.op_type


def _rename_operator(model: ModelProto, rng: random.Random) -> None:
    _node(model, rng).op_type = rng.choice(("Nonsense", "Loop", "If", "", "CumSum", "Range"))


def _change_domain(model: ModelProto, rng: random.Random) -> None:
    _node(model, rng).domain = rng.choice(("com.microsoft", "ai.onnx.ml", "made.up", "ai.onnx"))


def _change_version(model: ModelProto, rng: random.Random) -> None:
    entry = rng.choice(model.opset_import)
    entry.version = rng.choice((*_ODD_NUMBERS, 7, 9, 11, 13, 17, 21, 23, 25, 99))


def _change_attribute(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if not node.attribute:
        return
    attribute = rng.choice(node.attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice(_ODD_NUMBERS)
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice(_ODD_FLOATS)
    elif attribute.type == AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_ODD_NUMBERS)
    else:
        attribute.name = rng.choice(("axis", "perm", "made_up"))


def _retype_attribute(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.attribute:
        rng.choice(node.attribute).type = rng.randrange(0, 15)


def _drop_attribute(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def _change_inputs(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if rng.random() < 0.5:
        node.input.append(_some_name(model, rng))
    elif node.input:
        del node.input[rng.randrange(len(node.input))]


def _tensor(model: ModelProto, rng: random.Random) -> TensorProto:
    return rng.choice(model.graph.initializer)


def _change_dims(model: ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_ODD_NUMBERS)
    else:
        tensor.dims.append(rng.choice((0, 1, 2, 1 << 50)))


def _transpose_dims(model: ModelProto, rng: random.Random) -> None:
    """The same number of values in another shape."""
    tensor = _tensor(model, rng)
    dims = list(tensor.dims)
    rng.shuffle(dims)
    del tensor.dims[:]
    tensor.dims.extend(dims if rng.random() < 0.5 else [1, *dims])


def _change_type(model: ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.randrange(0, 30)


def _change_values(model: ModelProto, rng: random.Random) -> None:
    """Other numbers of the right type and shape; shapes and axes among them."""
    tensor = _tensor(model, rng)
    if tensor.data_type == TensorProto.INT64:
        size = len(tensor.raw_data) // 8
        numbers = [rng.choice(_ODD_NUMBERS) for _ in range(size)]
        tensor.raw_data = b"".join(n.to_bytes(8, "little", signed=True) for n in numbers)
    else:
        raw = bytearray(tensor.raw_data)
        for _ in range(4):
            if raw:
                raw[rng.randrange(len(raw))] = rng.choice((0, 0x7F, 0x80, 0xFF))
        tensor.raw_data = bytes(raw)


def _make_external(model: ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {
        "location": rng.choice(("../secret", "/etc/passwd", "missing.bin", "", ".", "model.onnx")),
        "offset": rng.choice(("0", "-1", "9" * 30, "x")),
        "length": rng.choice((str(len(tensor.raw_data)), "-5", "1e9")),
    }
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _change_port(model: ModelProto, rng: random.Random) -> None:
    port = rng.choice([*model.graph.input, *model.graph.output])
    choice = rng.random()
    if choice < 0.3:
        port.name = _some_name(model, rng)
    elif choice < 0.6:
        dims = port.type.tensor_type.shape.dim
        if dims:
            rng.choice(dims).dim_value = rng.choice(_ODD_NUMBERS)
    elif choice < 0.8:
        port.type.tensor_type.elem_type = rng.randrange(0, 30)
    else:
        port.type.ClearField("tensor_type")


def _add_function(model: ModelProto, rng: random.Random) -> None:
    """A local function that shadows an operator, and may call itself."""
    kind = _node(model, rng).op_type
    inner = rng.choice((kind, "Identity"))
    body = [helper.make_node(inner, ["x"], ["y"], domain=rng.choice(("", "local")))]
    function = helper.make_function("local", kind, ["x"], ["y"], body, model.opset_import)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    for node in model.graph.node:
        if node.op_type == kind and rng.random() < 0.5:
            node.domain = "local"


def _move_node(model: ModelProto, rng: random.Random) -> None:
    node = NodeProto()
    node.CopyFrom(model.graph.node[-1])
    del model.graph.node[-1]
    model.graph.node.insert(0, node)


_EDITS: tuple[Callable[[ModelProto, random.Random], None], ...] = (
    _rewire,
    _rewire,
    _rewire,
    _rename_output,
    _drop_node,
    _swap_operators,
    _rename_operator,
    _change_domain,
    _change_version,
    _change_attribute,
    _change_attribute,
    _retype_attribute,
    _drop_attribute,
    _change_inputs,
    _change_dims,
    _transpose_dims,
    _change_type,
    _change_values,
    _change_values,
    _make_external,
    _change_port,
    _add_function,
    _move_node,
)


def damaged_files(model: ModelProto, count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged copies of ``model``, half by bytes, half by edits, fixed by ``seed``."""
    rng = random.Random(seed)
    data = model.SerializeToString()
    for index in range(count):
        if index % 2:
            yield flip_bytes(data, rng)
        else:
            yield edit_graph(model, rng).SerializeToString()
