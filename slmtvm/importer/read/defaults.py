"""Attributes that an operator's definition lacks, at the value that says nothing.

Newer exporters write attributes that an older definition does not have, and onnxruntime saves all
attributes of an operator: at its default, one says what its absence says.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx
from onnx import AttributeProto

_Definition = tuple[int, Mapping[str, AttributeProto]]  # since which version, and default values


def is_default(domain: str, op_type: str, version: int, given: AttributeProto) -> bool:
    """Whether ``given`` is a default value in a definition of the operator, or in a later one.

    domain: "" for ai.onnx; version: of the operator set that the file imports. Definitions are
    those of the installed onnx and onnxruntime. Earlier ones do not count: what is gone from an
    operator may have meant something by default.
    """
    known = _definitions().get((domain, op_type), [])
    since = max((s for s, _ in known if s <= version), default=0)
    defaults = [values.get(given.name) for s, values in known if s >= since]
    return any(value is not None and _content(value) == _content(given) for value in defaults)


def _content(attribute: AttributeProto) -> tuple[int, bytes]:
    """Its type and value, without name and documentation."""
    bare = AttributeProto()
    bare.CopyFrom(attribute)
    for field in ("name", "doc_string", "ref_attr_name"):
        bare.ClearField(field)
    return attribute.type, bare.SerializeToString(deterministic=True)


@cache
def _definitions() -> dict[tuple[str, str], list[_Definition]]:
    """All definitions by domain and name."""
    found: dict[tuple[str, str], list[_Definition]] = {}

    def add(schema: Any, values: Mapping[str, AttributeProto]) -> None:
        domain = "" if schema.domain == "ai.onnx" else schema.domain
        found.setdefault((domain, schema.name), []).append((schema.since_version, values))

    for schema in onnx.defs.get_all_schemas_with_history():
        add(schema, {k: a.default_value for k, a in schema.attributes.items() if _is_value(a)})
    for schema in _onnxruntime_schemas():
        attributes = schema.attributes.items()
        read = {k: AttributeProto.FromString(a._default_value) for k, a in attributes}
        add(schema, {k: value for k, value in read.items() if value.type})
    return found


def _is_value(attribute: Any) -> bool:
    return bool(attribute.default_value.type)


def _onnxruntime_schemas() -> list[Any]:
    """Those of the installed onnxruntime; none where a release does not hand them out."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return []
    return list(get_all_operator_schema())
