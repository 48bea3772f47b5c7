"""Model-local functions, inlined: after this the graph holds operators only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto

from slmtvm.errors import InvalidModelError

_MAX_NODES = 200_000  # nested calls can multiply: a small file must not become an endless graph
_MAX_DEPTH = 64

_Functions = Mapping[tuple[str, str], FunctionProto]


def inline_functions(model: ModelProto, path: Path) -> list[NodeProto]:
    """The nodes of ``model``'s graph with every call of a local function replaced by its body.

    Raises InvalidModelError where functions call each other in a circle, a body uses another
    version of an operator set than the model, or the result passes a limit.
    """
    if not model.functions:
        return list(model.graph.node)
    functions: dict[tuple[str, str], FunctionProto] = {}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for function in model.functions:
        key = (function.domain, function.name)
        if key in functions:
            raise InvalidModelError(f"function {key} is defined twice", where=str(path))
        for entry in function.opset_import:
            if versions.get(entry.domain, entry.version) != entry.version:
                raise InvalidModelError(
                    f"function {function.name!r} uses version {entry.version} of "
                    f"{entry.domain or 'ai.onnx'}, the model {versions[entry.domain]}",
                    where=str(path),
                )
        functions[key] = function
    result: list[NodeProto] = []
    # Each entry: node, value renames, attributes of the call it lies in, depth, prefix.
    stack: list[tuple[NodeProto, dict[str, str], dict[str, AttributeProto], int, str]] = [
        (node, {}, {}, 0, "") for node in reversed(model.graph.node)
    ]
    calls = 0
    while stack:
        node, names, attributes, depth, prefix = stack.pop()
        node = _renamed(node, names, attributes, prefix)
        function = functions.get((node.domain, node.op_type))
        if function is None:
            result.append(node)
        else:
            if depth >= _MAX_DEPTH:
                raise InvalidModelError(
                    f"function {function.name!r} calls itself, or calls nest deeper than "
                    f"{_MAX_DEPTH}",
                    where=str(path),
                )
            calls += 1
            inner_prefix = f"{function.name}.{calls}/"
            inner_names, inner_attributes = _bindings(function, node, path)
            stack.extend(
                (inner, inner_names, inner_attributes, depth + 1, inner_prefix)
                for inner in reversed(function.node)
            )
        if len(result) + len(stack) > _MAX_NODES:
            raise InvalidModelError(
                f"its functions expand to over {_MAX_NODES} nodes", where=str(path)
            )
    return result


def _bindings(
    function: FunctionProto, call: NodeProto, path: Path
) -> tuple[dict[str, str], dict[str, AttributeProto]]:
    where = f"{path}: call {call.name!r} of function {function.name!r}"
    if len(call.input) > len(function.input) or len(call.output) > len(function.output):
        raise InvalidModelError("more inputs or outputs than the function has", where=where)
    names = dict.fromkeys(function.input, "")
    names.update(zip(function.input, call.input, strict=False))
    produced = {o for node in function.node for o in node.output}
    for inner, outer in zip(function.output, call.output, strict=False):
        if inner not in produced or inner in names:
            raise InvalidModelError(
                f"output {inner!r} of the function is not computed by its body", where=where
            )
        names[inner] = outer
    attributes = {a.name: a for a in function.attribute_proto}
    attributes.update({a.name: a for a in call.attribute})
    return names, attributes


def _renamed(
    node: NodeProto, names: Mapping[str, str], attributes: Mapping[str, AttributeProto], prefix: str
) -> NodeProto:
    if not prefix:
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    for field in (copy.input, copy.output):
        renamed = [names.get(n, prefix + n) if n else "" for n in field]
        del field[:]
        field.extend(renamed)
    del copy.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            copy.attribute.append(attribute)
        elif attribute.ref_attr_name in attributes:
            given = AttributeProto()
            given.CopyFrom(attributes[attribute.ref_attr_name])
            given.name = attribute.name
            copy.attribute.append(given)
    return copy
