"""An ONNX file to a checked Graph; nothing the file claims is believed before it is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from slmtvm.errors import InvalidModelError
from slmtvm.files import no_such_file
from slmtvm.importer.faults import named
from slmtvm.importer.graph import Constant, Graph, Node, Port, Subgraph, sort_nodes
from slmtvm.importer.read.formats import describe
from slmtvm.importer.read.functions import Body, Call, inline_functions
from slmtvm.importer.read.redact import fill, is_redacted
from slmtvm.importer.read.supported import check_supported
from slmtvm.importer.read.tensors import TensorReader

_MAX_FILE_BYTES = 2 << 30  # protobuf's own limit
_MIN_IR_VERSION = 3


def load(path: str | Path) -> Graph:
    """The graph of the ONNX file ``path``, local functions inlined, nodes sorted.

    Raises InvalidModelError for a file that is damaged, contradicts itself or breaks a limit, and
    UnsupportedOpError, listing all of them, for operators that the importer does not know.
    """
    path = Path(path)
    return _graph(_parse(path), path)


def count_operators(path: str | Path) -> dict[str, int]:
    """How many nodes of each operator the file has, known or not, the most frequent first.

    Raises InvalidModelError where it is no ONNX file.
    """
    path = Path(path)
    with named(path):
        nodes = _nested(_parse(path).graph)
    names = [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes]
    return dict(Counter(names).most_common())


def _parse(path: Path) -> ModelProto:
    model = _read(path)
    if model.ir_version < _MIN_IR_VERSION:
        raise InvalidModelError(
            f"ONNX IR version {model.ir_version}; {_MIN_IR_VERSION} or later is needed",
            where=str(path),
        )
    if is_redacted(model):
        fill(model)
    for text in _texts(model):
        if not isinstance(text, str):
            raise InvalidModelError(f"the name {text!r} is not UTF-8", where=str(path))
    return model


def _read(path: Path) -> ModelProto:
    """The model in ``path``; raises InvalidModelError saying what it is where it is none."""
    try:
        if path.is_dir():
            raise _not_onnx(path, "a folder")
        if not path.is_file():
            exists = path.exists()
            fault = "is a device or a pipe, not a file" if exists else no_such_file(path)
            raise InvalidModelError(fault, where=str(path))
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise _not_onnx(path, "a file of over 2 GB; save the model with external data")
        try:
            model = ModelProto.FromString(path.read_bytes())
        except (DecodeError, RuntimeError) as error:
            fault = f"not an ONNX file, or a damaged one: {error}"
            raise _not_onnx(path, fault) from error
        if not model.HasField("graph") or not model.opset_import:
            fault = "not an ONNX model: it has no graph or imports no operator set"
            raise _not_onnx(path, fault)
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return model


def _not_onnx(path: Path, fault: str) -> InvalidModelError:
    """The error for what is no ONNX file: its format where that is known, else ``fault``."""
    return InvalidModelError(f"this is {describe(path) or fault}", where=str(path))


def _texts(model: ModelProto) -> Iterator[object]:
    """All names that the importer reads: protobuf hands out bytes where they are not UTF-8."""
    graph = model.graph
    for node in (*_nested(graph), *(n for function in model.functions for n in _nested(function))):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name, attribute.t.name)
            yield from (t.name for t in (*attribute.g.initializer, *attribute.g.input))
            yield from (port.name for port in attribute.g.output)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        yield from (a.name for a in function.attribute_proto)
        yield from (entry.domain for entry in function.opset_import)
    yield from (entry.domain for entry in model.opset_import)
    sparse = [t for s in graph.sparse_initializer for t in (s.values, s.indices)]
    for tensor in (*graph.initializer, *sparse):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for port in (*graph.input, *graph.output, *graph.value_info):
        yield port.name
        yield from (d.dim_param for d in port.type.tensor_type.shape.dim)


def _nested(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """The nodes of a graph, those of its subgraphs after the node that holds them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nested(attribute.g)


def _graph(model: ModelProto, path: Path) -> Graph:
    reader = TensorReader(path)
    proto = model.graph
    initializers = _initializers(((t.name, t) for t in proto.initializer), reader)
    for sparse in proto.sparse_initializer:
        _check_new(sparse.values.name, initializers, reader)
        initializers[sparse.values.name] = reader.read_sparse(sparse)
    # Until IR version 4 every initializer was listed among the inputs as well.
    inputs = [_port(i, path) for i in proto.input if i.name not in initializers]
    outputs = [_port(o, path) for o in proto.output]
    if not outputs:
        raise InvalidModelError("the graph has no outputs", where=str(path))
    calls = inline_functions(model, path)
    check_supported(calls, path)
    nodes = [_node(call, reader) for call in calls]
    names = [p.name for p in inputs]
    if len(set(names)) != len(names):
        raise InvalidModelError("two graph inputs share one name", where=str(path))
    nodes_sorted = sort_nodes(nodes, [*names, *initializers], path)
    defined = {*names, *initializers, *(o for n in nodes for o in n.outputs)}
    for output in outputs:
        if output.name not in defined:
            raise InvalidModelError(f"output {output.name!r} is defined nowhere", where=str(path))
    declared = _declared(proto, path)
    return Graph(path, nodes_sorted, tuple(inputs), tuple(outputs), initializers, declared)


def _initializers(
    tensors: Iterable[tuple[str, TensorProto]], reader: TensorReader
) -> dict[str, Constant]:
    initializers: dict[str, Constant] = {}
    for name, tensor in tensors:
        _check_new(name if tensor.name else "", initializers, reader)
        initializers[name] = reader.read(tensor, name)
    return initializers


def _check_new(name: str, known: Mapping[str, Constant], reader: TensorReader) -> None:
    if not name or name in known:
        raise InvalidModelError(
            f"initializer {name!r} is unnamed or defined twice", where=str(reader.path)
        )


def _port(info: onnx.ValueInfoProto, path: Path) -> Port:
    if not info.type.HasField("tensor_type"):
        raise InvalidModelError(
            f"{info.name!r} is not a tensor; sequences and maps are not supported", where=str(path)
        )
    tensor = info.type.tensor_type
    dims: tuple[int | str | None, ...] | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in tensor.shape.dim
        )
    return Port(info.name, tensor.elem_type, dims)


def _declared(proto: GraphProto, path: Path) -> dict[str, Port]:
    tensors = [v for v in proto.value_info if v.type.HasField("tensor_type")]
    return {v.name: _port(v, path) for v in tensors}


def _node(call: Call, reader: TensorReader) -> Node:
    proto = call.proto
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    where = f"{reader.path}: {proto.op_type} node {proto.name!r}"
    if not any(proto.output):
        raise InvalidModelError("a node has no outputs", where=where)
    attrs: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.name in attrs:
            raise InvalidModelError(f"attribute {attribute.name!r} is given twice", where=where)
        attrs[attribute.name] = _attribute(attribute, reader, where)
    bodies = {name: _subgraph(body, reader, where) for name, body in call.bodies.items()}
    captured = dict.fromkeys(name for body in bodies.values() for name in body.captured)
    return Node(
        domain,
        proto.op_type,
        call.versions[domain],
        proto.name,
        (*proto.input, *captured),
        tuple(proto.output),
        {**attrs, **bodies},
    )


def _subgraph(body: Body, reader: TensorReader, where: str) -> Subgraph:
    if body.inputs:
        raise InvalidModelError(f"its subgraph has inputs {list(body.inputs)}", where=where)
    initializers = _initializers(body.initializers, reader)
    nodes = [_node(call, reader) for call in body.calls]
    own = {*initializers, *(o for node in nodes for o in node.outputs)}
    used = [*(i for node in nodes for i in node.inputs if i), *body.outputs]
    captured = tuple(dict.fromkeys(name for name in used if name not in own))
    nodes_sorted = sort_nodes(nodes, [*initializers, *captured], reader.path)
    return Subgraph(nodes_sorted, body.outputs, initializers, captured)


def _attribute(attribute: AttributeProto, reader: TensorReader, where: str) -> Any:
    kind = attribute.type
    if kind == AttributeProto.INT:
        return attribute.i
    if kind == AttributeProto.FLOAT:
        return attribute.f
    if kind == AttributeProto.STRING:
        return attribute.s.decode("utf-8", errors="replace")
    if kind == AttributeProto.INTS:
        return tuple(attribute.ints)
    if kind == AttributeProto.FLOATS:
        return tuple(attribute.floats)
    if kind == AttributeProto.TENSOR:
        return _tensor(attribute.t, attribute.name, reader)
    raise InvalidModelError(
        f"attribute {attribute.name!r} has a type that is not supported here", where=where
    )


def _tensor(tensor: TensorProto, name: str, reader: TensorReader) -> Constant:
    return reader.read(tensor, tensor.name or name)
