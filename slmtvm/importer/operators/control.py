"""Control flow: an If is known here so that load takes it; expand puts a branch in its place."""

from __future__ import annotations

from typing import Any

from slmtvm.importer.operators.registry import Attrs, Kind, register


@register("If", 1, Kind.BRANCH)
def branch(_attrs: Attrs, *_inputs: Any) -> Any:
    raise ValueError("its condition is no single boolean")
