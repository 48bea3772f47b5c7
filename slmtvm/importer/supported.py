"""Whether the importer knows every operator of a file, and each node fits its operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.expand.registry import Expansion, find_expansion
from slmtvm.importer.functions import Call
from slmtvm.importer.operators import MAX_OPSET, MIN_OPSET, Operator, find
from slmtvm.importer.operators.attributes import fault_of

_MICROSOFT_VERSION = 1
_NODES_SHOWN = 4  # of each unknown operator


def check_supported(calls: Iterable[Call], path: Path) -> None:
    """Check every node's operator and number of inputs, subgraphs included.

    Raises UnsupportedOpError with all unknown operators of the file, and InvalidModelError for a
    node that its operator's schema does not allow.
    """
    unknown: dict[str, list[str]] = {}
    for call in _nested(calls):
        node = call.proto
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = call.versions.get(domain)
        if version is None:
            raise InvalidModelError(
                f"uses operator set {domain or 'ai.onnx'!r}, which the model does not import",
                where=f"{path}: {node.op_type} node {node.name!r}",
            )
        operator: Operator | Expansion | None = None
        if _known(domain, version):
            operator = find(domain, node.op_type, version) or find_expansion(
                domain, node.op_type, version
            )
        if operator is None:
            title = f"{domain or 'ai.onnx'}.{node.op_type} (version {version})"
            unknown.setdefault(title, []).append(node.name or (list(node.output) or [""])[0])
        else:
            _check_schema(call, operator, version, path)
    if unknown:
        lines = [f"  {title}: {_some(names)}" for title, names in sorted(unknown.items())]
        raise UnsupportedOpError(
            f"operators that are not supported (ai.onnx {MIN_OPSET} to {MAX_OPSET} and "
            "com.microsoft 1 are known):\n" + "\n".join(lines),
            where=str(path),
        )


def _nested(calls: Iterable[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        for body in call.bodies.values():
            yield from _nested(body.calls)


def _known(domain: str, version: int) -> bool:
    if domain == "":
        return MIN_OPSET <= version <= MAX_OPSET
    return domain == "com.microsoft" and version == _MICROSOFT_VERSION


def _some(names: list[str]) -> str:
    more = len(names) - _NODES_SHOWN
    shown = ", ".join(repr(n) for n in names[:_NODES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def _check_schema(call: Call, operator: Operator | Expansion, version: int, path: Path) -> None:
    node = call.proto
    where = f"{path}: {node.op_type} node {node.name!r}"
    if operator.domain or not onnx.defs.has(node.op_type, version, ""):
        fewest, most = operator.arity
        kinds = dict(operator.attributes)
    else:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        fewest, most = schema.min_input, schema.max_input
        kinds = {k: (int(a.type), a.required) for k, a in schema.attributes.items()}
    if not fewest <= len(node.input) <= most:
        raise InvalidModelError(
            f"has {len(node.input)} inputs; the operator takes {fewest} to {most}", where=where
        )
    if any(not name for name in list(node.input)[:fewest]):
        raise InvalidModelError("a required input is absent", where=where)
    for attribute in node.attribute:
        expected = kinds.get(attribute.name)
        if expected is None or expected[0] != attribute.type:
            raise InvalidModelError(
                f"attribute {attribute.name!r} is not one of the operator, or of another type",
                where=where,
            )
        value = onnx.helper.get_attribute_value(attribute)
        fault = fault_of(node.op_type, attribute.name, value)
        if fault is not None:
            raise InvalidModelError(fault, where=where)
    given = {attribute.name for attribute in node.attribute} | call.bodies.keys()
    for name, (_, required) in kinds.items():
        if required and name not in given:
            raise InvalidModelError(f"attribute {name!r} is missing", where=where)
