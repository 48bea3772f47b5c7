"""What a JSON schema asks: its types, references and bounds, and several schemas at once.

A keyword that cannot be followed is refused by name: that it would be left out must not go unseen.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from slmtvm.errors import ConstraintError

Schema = Any  # what JSON may be; checked here
ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly", "$anchor",
})  # fmt: skip
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set[str](),
    "null": set[str](),
}
COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
MOST_REFERENCES = 1000  # in one schema, followed


class SchemaReader:
    """Reads the parts of the schema ``root``; ``where`` is how messages name it.

    Every method raises ConstraintError, naming the place and the keyword, for what is not compiled.
    """

    def __init__(self, root: Schema, where: str) -> None:
        self.root, self.where = root, where
        self.followed = 0

    def refused(self, place: str, what: str) -> ConstraintError:
        return ConstraintError(f"at {place or '/'}: {what}", where=self.where)

    def beside(self, types: list[str], name: str) -> str:
        for type_, names in OF_TYPE.items():
            if name in names and type_ not in types:
                return f" beside the type {' or '.join(types)}"
        return ""

    def types(self, schema: dict[str, Any], place: str) -> list[str]:
        """Its types; where it says none, those that its keywords are of."""
        given = schema.get("type")
        if given is None:
            implied = [t for t, names in OF_TYPE.items() if names & schema.keys()]
            if "number" in implied:
                implied.remove("integer")
            if len(implied) != 1:
                raise self.refused(place, f"{', '.join(schema)} without a type is not compiled")
            return implied
        types = list(given) if isinstance(given, list) else [given]
        for type_ in types:
            if not isinstance(type_, str) or type_ not in OF_TYPE:
                raise self.refused(place, f"type is {type_!r}; known are {', '.join(OF_TYPE)}")
        if "number" in types and "integer" in types:
            types.remove("integer")  # numbers are these, too
        if not types:
            raise self.refused(place, "type is an empty list")
        return types

    def alone(self, name: str, others: set[str], place: str) -> None:
        if others:
            raise self.refused(
                place, f"{', '.join(sorted(others))} beside {name} is not compiled: put it inside"
            )

    def found(self, given: str, place: str) -> Schema:
        node: Any = self.root
        for part in given.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise self.refused(place, f"$ref is {given!r}, which is not there")
        return node

    def resolved(self, schema: Schema, place: str) -> Schema:
        for _ in range(MOST_REFERENCES):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                return schema
            self.alone("$ref", schema.keys() - {"$ref"} - ANNOTATIONS, place)
            schema = self.found(schema["$ref"], place)
        raise self.refused(place, "$ref refers to itself")

    def merged(self, schemas: list[Schema], place: str) -> Schema:
        """One schema that asks what all of them ask; of objects their properties together."""
        made: dict[str, Any] = {}
        closed = []
        for schema in schemas:
            schema = self.resolved(schema, place)
            if schema is True:
                continue
            if not isinstance(schema, dict):
                raise self.refused(place, f"{schema!r} among schemas that all must hold")
            if schema.get("additionalProperties", True) is not True:
                closed.append(schema)
            for name, value in schema.items():
                if name in ANNOTATIONS:
                    continue
                if name not in made:
                    made[name] = value
                elif name == "required":
                    made[name] = list(dict.fromkeys([*made[name], *value]))
                elif name == "properties" and not made[name].keys() & value.keys():
                    made[name] = {**made[name], **value}
                elif name == "type" and self.narrowed(made[name], value):
                    made[name] = self.narrowed(made[name], value)
                elif not same_value(made[name], value):
                    raise self.refused(place, f"{name} more than once is not compiled")
        for schema in closed:
            if made.get("properties", {}).keys() != schema.get("properties", {}).keys():
                raise self.refused(place, "additionalProperties beside others' properties")
        return made

    def narrowed(self, first: Any, second: Any) -> list[str]:
        """The types that both allow; an integer is a number."""
        both = [first if isinstance(first, list) else [first],
                second if isinstance(second, list) else [second]]  # fmt: skip
        found = []
        for type_ in OF_TYPE:
            if all(type_ in t or (type_ == "integer" and "number" in t) for t in both):
                found.append(type_)
        return found

    def check_apart(self, options: list[Schema], place: str) -> None:
        """Refuses alternatives of which two may hold for one value."""
        found = [self.resolved(option, place) for option in options]
        for i, first in enumerate(found):
            for second in found[:i]:
                if not self.apart(first, second, place):
                    raise self.refused(
                        place, "alternatives that may both hold are not compiled: use anyOf, or "
                        "types or constants that tell them apart"
                    )  # fmt: skip

    def apart(self, first: Schema, second: Schema, place: str) -> bool:
        if not (isinstance(first, dict) and isinstance(second, dict)):
            return False
        values = [listed_values(schema) for schema in (first, second)]
        if values[0] is not None and values[1] is not None:
            return not any(same_value(a, b) for a in values[0] for b in values[1])
        types = [self.kinds(schema, place) for schema in (first, second)]
        if not types[0] & types[1]:
            return True
        if types[0] & types[1] != {"object"}:
            return False
        for name in set(first.get("required", ())) & set(second.get("required", ())):
            inner = [
                self.resolved(s.get("properties", {}).get(name), place) for s in (first, second)
            ]
            if all(isinstance(s, dict) for s in inner) and self.apart(inner[0], inner[1], place):
                return True
        return False

    def kinds(self, schema: dict[str, Any], place: str) -> set[str]:
        if (values := listed_values(schema)) is not None:
            return {t for t in OF_TYPE if t != "integer" and any(is_of_type(v, t) for v in values)}
        if any(name in schema for name in COMBINED):
            return set(OF_TYPE)
        return {"number" if t == "integer" else t for t in self.types(schema, place)}

    def bounds(
        self, schema: dict[str, Any], place: str
    ) -> tuple[Decimal | None, Decimal | None, bool, bool]:
        """The least and the most, and whether they are left out themselves."""
        found: dict[str, Decimal] = {}
        for name in OF_TYPE["number"] & schema.keys():
            value = schema[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
                raise self.refused(place, f"{name} is {value!r}, must be a number")
            found[name] = Decimal(repr(value))
        least, over = found.get("minimum"), False
        if "exclusiveMinimum" in found and (least is None or found["exclusiveMinimum"] >= least):
            least, over = found["exclusiveMinimum"], True
        most, under = found.get("maximum"), False
        if "exclusiveMaximum" in found and (most is None or found["exclusiveMaximum"] <= most):
            most, under = found["exclusiveMaximum"], True
        return least, most, over, under

    def count(self, schema: dict[str, Any], name: str, place: str) -> int | None:
        value = schema.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
            raise self.refused(place, f"{name} is {value!r}, must be a whole number")
        return int(value)


def listed_values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def same_value(first: object, second: object) -> bool:
    """Whether two JSON values are equal: true is not 1, and 1.0 is 1."""
    return _key(first) == _key(second)


def _key(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, dict):
        return {name: _key(inner) for name, inner in value.items()}
    return [_key(inner) for inner in value] if isinstance(value, list) else ("", value)


def is_of_type(value: object, type_: str) -> bool:
    if type_ in ("integer", "number"):
        whole = type_ == "number" or (isinstance(value, int | float) and value % 1 == 0)
        return isinstance(value, int | float) and not isinstance(value, bool) and whole
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    }  # fmt: skip
    return isinstance(value, kinds[type_])
