"""Whether the importer knows every operator of a file, and each node fits its operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.expand.registry import Expansion, find_expansion
from slmtvm.importer.operators import MAX_OPSET, MIN_OPSET, Operator, find
from slmtvm.importer.operators.attributes import fault_of
from slmtvm.importer.read.defaults import is_default
from slmtvm.importer.read.functions import Call

_MICROSOFT_VERSION = 1
_NODES_SHOWN = 4  # of each unknown operator


def check_supported(calls: Iterable[Call], path: Path) -> None:
    """Check every node's operator and number of inputs, subgraphs included.

    Raises UnsupportedOpError where operator sets are newer or older than what is known, or with all
    unknown operators of the file, and InvalidModelError for a node that its operator's schema does
    not allow.
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
        _check_version(domain, version, path)
        operator = _find(domain, node.op_type, version)
        if operator is None:
            title = _title(domain, node.op_type, version)
            name = node.name or (list(node.output) or [""])[0]
            unknown.setdefault(title, []).append(name)
        else:
            _check_schema(call, operator, version, path)
    if unknown:
        lines = [f"  {title}: {_some(names)}" for title, names in sorted(unknown.items())]
        raise UnsupportedOpError(
            f"operators that are not supported (ai.onnx {MIN_OPSET} to {_newest()} and "
            f"com.microsoft {_MICROSOFT_VERSION} are known):\n" + "\n".join(lines),
            where=str(path),
        )


def _nested(calls: Iterable[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        for body in call.bodies.values():
            yield from _nested(body.calls)


def _newest() -> int:
    """The newest operator set of ai.onnx that is read, where its definitions are known ones."""
    return max(MAX_OPSET, int(onnx.defs.onnx_opset_version()))


def _check_version(domain: str, version: int, path: Path) -> None:
    known = {"": (MIN_OPSET, _newest()), "com.microsoft": (_MICROSOFT_VERSION,) * 2}
    oldest, newest = known.get(domain, (version, version))
    if version > newest:
        raise UnsupportedOpError(
            f"operator set {version} of {domain or 'ai.onnx'} is newer than what is known, which "
            f"is {newest}; export the model with that one",
            where=str(path),
        )
    if version < oldest:
        raise UnsupportedOpError(
            f"operator set {version} of {domain or 'ai.onnx'} is older than what is supported, "
            f"{oldest} to {newest}; export the model with one of these, or convert it with "
            "onnx.version_converter",
            where=str(path),
        )


def _find(domain: str, op_type: str, version: int) -> Operator | Expansion | None:
    """The table's entry; None where there is none that is known to mean what the file does."""
    if domain == "" and _since(op_type, version) > MAX_OPSET:
        return None
    return find(domain, op_type, version) or find_expansion(domain, op_type, version)


def _since(op_type: str, version: int) -> int:
    """From which version on ai.onnx has the definition that holds at ``version``."""
    if not onnx.defs.has(op_type, version, ""):
        return 0
    return int(onnx.defs.get_schema(op_type, version, "").since_version)


def _title(domain: str, op_type: str, version: int) -> str:
    name = f"{domain or 'ai.onnx'}.{op_type}"
    if domain == "" and _since(op_type, version) > MAX_OPSET and find(domain, op_type, MAX_OPSET):
        return f"{name} (as version {_since(op_type, version)} changed it)"
    return f"{name} (version {version})"


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
        if expected is None and is_default(operator.domain, node.op_type, version, attribute):
            continue
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
