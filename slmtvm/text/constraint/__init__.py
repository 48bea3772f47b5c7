"""Constrained output: a JSON schema, a regex or choices, compiled to tables that C follows."""

from slmtvm.text.constraint.compile import (
    CompiledConstraint,
    compile_constraint,
)
from slmtvm.text.constraint.json_schema import schema_regex

__all__ = ["CompiledConstraint", "compile_constraint", "schema_regex"]
