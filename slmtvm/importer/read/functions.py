"""Model-local functions, inlined: after this the graph holds operators only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx import OperatorSetIdProto as OpsetProto

from slmtvm.errors import InvalidModelError

_MAX_NODES = 200_000  # nested calls can multiply: a small file must not become an endless graph
_MAX_DEPTH = 64

# onnxruntime's quantizers write its operators without importing their set, and it takes them.
_ASSUMED = {"com.microsoft": 1}

_Key = tuple[str, str, str]  # domain, name, overload


@dataclass(frozen=True)
class Body:
    """A subgraph, such as a branch of an If; names of its own are unlike all outside of it."""

    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    initializers: tuple[tuple[str, TensorProto], ...]


@dataclass(frozen=True)
class Call:
    """One operator call: ``proto`` without its subgraphs, which are in ``bodies`` by attribute."""

    proto: NodeProto
    versions: Mapping[str, int]  # of the operator sets; "" is ai.onnx
    bodies: Mapping[str, Body] = field(default_factory=dict)


def inline_functions(model: ModelProto, path: Path) -> list[Call]:
    """The calls of ``model``'s graph, every one of a local function replaced by its body.

    Raises InvalidModelError where functions call each other in a circle or the result passes a
    limit.
    """
    functions: dict[_Key, FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            raise InvalidModelError(f"function {key[:2]} is defined twice", where=str(path))
        functions[key] = function
    versions = {**_ASSUMED, **import_versions(model.opset_import, path)}
    scope = _Scope(versions, {}, {}, "", 0)
    return list(_Inliner(functions, path).calls(model.graph.node, scope))


def import_versions(imports: Iterable[OpsetProto], path: Path) -> dict[str, int]:
    """The version of each operator set; raises InvalidModelError where one has two."""
    versions: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise InvalidModelError(
                f"imports two versions of operator set {domain or 'ai.onnx'}", where=str(path)
            )
    return versions


@dataclass(frozen=True)
class _Scope:
    """Where a node stands: in the graph, or in one call of a function."""

    versions: Mapping[str, int]
    names: Mapping[str, str]  # of the function's inputs and outputs -> of the call's
    attributes: Mapping[str, AttributeProto]  # of the call
    prefix: str  # of all other names
    depth: int

    def name(self, name: str) -> str:
        return self.names.get(name, self.prefix + name) if name else ""


class _Inliner:
    def __init__(self, functions: Mapping[_Key, FunctionProto], path: Path) -> None:
        self._functions = functions
        self._path = path
        self._function_calls = 0
        self._nodes = 0

    def calls(self, nodes: Iterable[NodeProto], scope: _Scope) -> Iterator[Call]:
        for node in nodes:
            self._nodes += 1
            if self._nodes > _MAX_NODES:
                raise InvalidModelError(
                    f"its functions expand to over {_MAX_NODES} nodes", where=str(self._path)
                )
            call = self._call(node, scope)
            function = self._functions.get((node.domain, node.op_type, node.overload))
            if function is None:
                yield call
            else:
                yield from self.calls(function.node, self._enter(function, call, scope.depth))

    def _call(self, node: NodeProto, scope: _Scope) -> Call:
        """``node`` with the names and attributes that it has outside of its function."""
        bodies: dict[str, Body] = {}
        attributes: list[AttributeProto] = []
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
                bodies[attribute.name] = self._body(attribute.g, scope)
            else:
                attributes.append(attribute)
        if not scope.prefix and not bodies:
            return Call(node, scope.versions)
        copy = NodeProto(op_type=node.op_type, domain=node.domain, name=scope.prefix + node.name)
        copy.input.extend(map(scope.name, node.input))
        copy.output.extend(map(scope.name, node.output))
        for attribute in attributes:
            if not attribute.ref_attr_name:
                copy.attribute.append(attribute)
            elif attribute.ref_attr_name in scope.attributes:
                given = AttributeProto()
                given.CopyFrom(scope.attributes[attribute.ref_attr_name])
                given.name = attribute.name
                copy.attribute.append(given)
        return Call(copy, scope.versions, bodies)

    def _body(self, graph: GraphProto, scope: _Scope) -> Body:
        return Body(
            tuple(self.calls(graph.node, scope)),
            tuple(scope.name(port.name) for port in graph.output),
            tuple(scope.name(port.name) for port in graph.input),
            tuple((scope.name(tensor.name), tensor) for tensor in graph.initializer),
        )

    def _enter(self, function: FunctionProto, call: Call, depth: int) -> _Scope:
        """The scope of ``function``'s body in ``call``."""
        proto = call.proto
        where = f"{self._path}: call {proto.name!r} of function {function.name!r}"
        if depth >= _MAX_DEPTH:
            raise InvalidModelError(
                f"function {function.name!r} calls itself, or calls nest deeper than {_MAX_DEPTH}",
                where=str(self._path),
            )
        if len(proto.input) > len(function.input) or len(proto.output) > len(function.output):
            raise InvalidModelError("more inputs or outputs than the function has", where=where)
        names = dict.fromkeys(function.input, "")
        names.update(zip(function.input, proto.input, strict=False))
        produced = {o for node in function.node for o in node.output}
        for inner, outer in zip(function.output, proto.output, strict=False):
            if inner not in produced or inner in names:
                raise InvalidModelError(
                    f"output {inner!r} of the function is not computed by its body", where=where
                )
            if outer:
                names[inner] = outer
        attributes = {a.name: a for a in function.attribute_proto}
        attributes.update({a.name: a for a in proto.attribute})
        self._function_calls += 1
        # Functions may use other versions of an operator set than the graph does.
        versions = {**call.versions, **import_versions(function.opset_import, self._path)}
        prefix = f"{function.name}.{self._function_calls}/"
        return _Scope(versions, names, attributes, prefix, depth + 1)
