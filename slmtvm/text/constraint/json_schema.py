"""A JSON schema (2020-12) as a regex of texts that are valid by it.

All that is written is valid; not all that is valid can be written: properties come in the
schema's order, and others only where nothing else is said; strings escape what they must; integers
have up to 15 digits. A keyword that is not known here is refused by name: that it would be left out
must not go unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from slmtvm.errors import ConstraintError
from slmtvm.text.constraint.json_strings import (
    FORMATS,
    literal,
    pattern_regex,
    string_regex,
)
from slmtvm.text.constraint.number_ranges import INTEGER, NUMBER, integer_regex, number_regex

Schema = Any  # what JSON may be; checked here
_ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default",
    "examples", "deprecated", "readOnly", "writeOnly", "$anchor",
})  # fmt: skip
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set[str](),
    "null": set[str](),
}
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_MOST_ITEMS = 200
_MOST_REFERENCES = 1000  # in one schema, followed
_MOST_REGEX = 4_000_000  # characters
_ANY_DEPTH = 2  # arrays and objects inside each other where a schema says nothing
_COMMA, _COLON = ",[ ]?", ":[ ]?"


def schema_regex(schema: Schema, where: str = "the schema") -> str:
    """A regex, in Rust's syntax, of texts that are valid by ``schema`` (what json.load gives).

    Raises ConstraintError, naming the place and the keyword, for what is not compiled.
    """
    regex = _Compiler(schema, where).value(schema, "")
    if len(regex) > _MOST_REGEX:
        raise ConstraintError("is too large to be compiled", where=where)
    return regex


class _Compiler:
    def __init__(self, root: Schema, where: str) -> None:
        self.root, self.where = root, where
        self.open: list[str] = []  # references that are being followed
        self.followed = 0

    def refused(self, place: str, what: str) -> ConstraintError:
        return ConstraintError(f"at {place or '/'}: {what}", where=self.where)

    def value(self, schema: Schema, place: str) -> str:
        if schema is True or schema == {}:
            return _anything(_ANY_DEPTH)
        if not isinstance(schema, dict):
            what = "false allows nothing" if schema is False else f"{schema!r} is no schema"
            raise self.refused(place, what)
        asked = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        if not asked:
            return _anything(_ANY_DEPTH)
        combined = [name for name in _COMBINED if name in asked]
        if combined:
            return self.combination(combined[0], asked, place)
        types = self.types(asked, place)
        known = set().union({"type"}, *(_OF_TYPE[type_] for type_ in types))
        for name in asked:
            if name not in known:
                raise self.refused(
                    place, f"{name} is not compiled{self.beside(types, name)}: leave it out, or "
                    "say it in another way"
                )  # fmt: skip
        makers: Mapping[str, Callable[[dict[str, Any], str], str]] = {
            "object": self.object, "array": self.array, "string": self.string,
            "integer": self.integer, "number": self.number,
            "boolean": lambda *_: "(?:true|false)", "null": lambda *_: "null",
        }  # fmt: skip
        return _choice([makers[type_](asked, place) for type_ in types])

    def beside(self, types: list[str], name: str) -> str:
        for type_, names in _OF_TYPE.items():
            if name in names and type_ not in types:
                return f" beside the type {' or '.join(types)}"
        return ""

    def types(self, schema: dict[str, Any], place: str) -> list[str]:
        """Its types; where it says none, those that its keywords are of."""
        given = schema.get("type")
        if given is None:
            implied = [t for t, names in _OF_TYPE.items() if names & schema.keys()]
            if "number" in implied:
                implied.remove("integer")
            if len(implied) != 1:
                raise self.refused(place, f"{', '.join(schema)} without a type is not compiled")
            return implied
        types = list(given) if isinstance(given, list) else [given]
        for type_ in types:
            if not isinstance(type_, str) or type_ not in _OF_TYPE:
                raise self.refused(place, f"type is {type_!r}; known are {', '.join(_OF_TYPE)}")
        if "number" in types and "integer" in types:
            types.remove("integer")  # numbers are these, too
        if not types:
            raise self.refused(place, "type is an empty list")
        return types

    # ---- combinations ----

    def combination(self, name: str, schema: dict[str, Any], place: str) -> str:
        others = schema.keys() - {name}
        inner = f"{place}/{name}"
        if name == "$ref":
            self.alone(name, others, place)
            return self.reference(schema[name], place)
        if name in ("enum", "const"):
            return self.listed(name, schema, others, place)
        options = schema[name]
        if not isinstance(options, list) or not options:
            raise self.refused(place, f"{name} must be a list of schemas")
        if name == "allOf":
            return self.value(self.merged([*options, {k: schema[k] for k in others}], inner), place)
        self.alone(name, others - {"type"}, place)
        if "type" in others:
            options = [self.merged([o, {"type": schema["type"]}], inner) for o in options]
        if name == "oneOf":
            self.check_apart(options, inner)
        return _choice([self.value(o, f"{inner}/{i}") for i, o in enumerate(options)])

    def alone(self, name: str, others: set[str], place: str) -> None:
        if others:
            raise self.refused(
                place, f"{', '.join(sorted(others))} beside {name} is not compiled: put it inside"
            )

    def listed(self, name: str, schema: dict[str, Any], others: set[str], place: str) -> str:
        self.alone(name, others - {"type", "const" if name == "enum" else "enum"}, place)
        values = schema["enum"] if name == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise self.refused(place, "enum must be a list of values")
        if name == "enum" and "const" in others:
            values = [value for value in values if _same(value, schema["const"])]
        if "type" in others:
            types = self.types({"type": schema["type"]}, place)
            values = [value for value in values if any(_is_of(value, t) for t in types)]
        if not values:
            raise self.refused(place, f"none of the values of {name} is allowed by what is beside")
        return _choice([literal(value) for value in values])

    def reference(self, given: object, place: str) -> str:
        if not isinstance(given, str) or not (given == "#" or given.startswith("#/")):
            raise self.refused(place, f"$ref is {given!r}; those inside of the schema are compiled")
        if given in self.open:
            raise self.refused(
                place, f"{given} refers to itself; a constraint has no depth without end: write as "
                "many levels as are wanted"
            )  # fmt: skip
        self.followed += 1
        if self.followed > _MOST_REFERENCES:
            raise self.refused(place, f"more than {_MOST_REFERENCES} references are followed")
        self.open.append(given)
        made = self.value(self.found(given, place), given)
        self.open.pop()
        return made

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
        for _ in range(_MOST_REFERENCES):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                return schema
            self.alone("$ref", schema.keys() - {"$ref"} - _ANNOTATIONS, place)
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
                if name in _ANNOTATIONS:
                    continue
                if name not in made:
                    made[name] = value
                elif name == "required":
                    made[name] = list(dict.fromkeys([*made[name], *value]))
                elif name == "properties" and not made[name].keys() & value.keys():
                    made[name] = {**made[name], **value}
                elif name == "type" and self.narrowed(made[name], value):
                    made[name] = self.narrowed(made[name], value)
                elif not _same(made[name], value):
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
        for type_ in _OF_TYPE:
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
        values = [_values(schema) for schema in (first, second)]
        if values[0] is not None and values[1] is not None:
            return not any(_same(a, b) for a in values[0] for b in values[1])
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
        if (values := _values(schema)) is not None:
            return {t for t in _OF_TYPE if t != "integer" and any(_is_of(v, t) for v in values)}
        if any(name in schema for name in _COMBINED):
            return set(_OF_TYPE)
        return {"number" if t == "integer" else t for t in self.types(schema, place)}

    # ---- values ----

    def string(self, schema: dict[str, Any], place: str) -> str:
        least = self.count(schema, "minLength", place) or 0
        most = self.count(schema, "maxLength", place)
        said = [name for name in ("pattern", "format") if name in schema]
        if len(said) > 1 or (said and (least or most is not None)):
            raise self.refused(place, f"{said[0]} beside a length or another is not compiled")
        where = f"{self.where}: at {place or '/'}"
        if "pattern" in schema:
            if not isinstance(schema["pattern"], str):
                raise self.refused(place, "pattern must be a string")
            return pattern_regex(schema["pattern"], f"{where}: pattern {schema['pattern']!r}")
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise self.refused(
                    place, f"format is {schema['format']!r}; known are {', '.join(FORMATS)}"
                )
            return f'"{FORMATS[schema["format"]]}"'
        if most is not None and most < least:
            raise self.refused(place, f"maxLength {most} is below minLength {least}")
        return string_regex(least, most, where)

    def integer(self, schema: dict[str, Any], place: str) -> str:
        least, most, over, under = self.bounds(schema, place)
        if least is None and most is None:
            return INTEGER
        # A strict bound of whole numbers is the next one.
        if least is not None and over:
            least = least.to_integral_value("ROUND_FLOOR") + 1
        if most is not None and under:
            most = most.to_integral_value("ROUND_CEILING") - 1
        return integer_regex(least, most, f"{self.where}: at {place or '/'}")

    def number(self, schema: dict[str, Any], place: str) -> str:
        least, most, over, under = self.bounds(schema, place)
        if least is None and most is None:
            return NUMBER
        return number_regex(least, most, over, under, f"{self.where}: at {place or '/'}")

    def bounds(
        self, schema: dict[str, Any], place: str
    ) -> tuple[Decimal | None, Decimal | None, bool, bool]:
        """The least and the most, and whether they are left out themselves."""
        found: dict[str, Decimal] = {}
        for name in _OF_TYPE["number"] & schema.keys():
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

    def array(self, schema: dict[str, Any], place: str) -> str:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self.refused(place, "prefixItems must be a list of schemas")
        least = self.count(schema, "minItems", place) or 0
        most = self.count(schema, "maxItems", place)
        rest = schema.get("items", True)
        if rest is False or (first and "items" not in schema and least <= len(first)):
            most = len(first) if most is None else min(most, len(first))
        if most is not None and most < least:
            raise self.refused(place, f"no array has at least {least} and at most {most} items")
        if max(least, most or 0) > _MOST_ITEMS:
            raise self.refused(place, f"arrays are compiled to {_MOST_ITEMS} items")
        made = (
            ""
            if most is not None and most <= len(first)
            else self.more_items(self.value(rest, f"{place}/items"), len(first), least, most)
        )
        for i in reversed(range(len(first) if most is None else min(most, len(first)))):
            item = (_COMMA if i else "") + self.value(first[i], f"{place}/prefixItems/{i}") + made
            made = item if i < least else f"(?:{item})?"
        return rf"\[{made}\]"

    def more_items(self, item: str, before: int, least: int, most: int | None) -> str:
        """Items behind ``before`` others."""
        low, high = max(0, least - before), None if most is None else most - before
        following = f"(?:{_COMMA}{item})"
        if before:
            return f"{following}{{{low},{'' if high is None else high}}}"
        if high == 0:
            return ""
        end = "" if high is None else high - 1
        some = f"{item}{following}{{{max(0, low - 1)},{end}}}"
        return some if low else f"(?:{some})?"

    def object(self, schema: dict[str, Any], place: str) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise self.refused(place, "properties must be an object, and required a list")
        least = self.count(schema, "minProperties", place) or 0
        most = self.count(schema, "maxProperties", place)
        fields = {name: inner for name, inner in properties.items() if inner is not False}
        for name in required:
            if name not in fields:
                if others is False or properties.get(name, True) is False:
                    raise self.refused(place, f"{name!r} is required and not allowed")
                fields[name] = others
        if not fields:
            return self.map(others, least, most, place)
        if least > len(set(required)) or (most is not None and most < len(fields)):
            raise self.refused(place, "minProperties and maxProperties beside properties that may "
                                      "be left out are not compiled")  # fmt: skip
        made = []
        for name, inner in fields.items():
            value = self.value(inner, f"{place}/properties/{name}")
            made.append((literal(name) + _COLON + value, name in required))
        return rf"\{{{_members(made)}\}}"

    def map(self, others: Schema, least: int, most: int | None, place: str) -> str:
        """An object of any names, which may come twice: the last one counts."""
        if others is False:
            if least:
                raise self.refused(place, f"minProperties is {least}, and none is allowed")
            return r"\{\}"
        if least > 1:
            raise self.refused(place, "minProperties above 1 of any names is not compiled")
        if most is not None and most > _MOST_ITEMS:
            raise self.refused(place, f"objects are compiled to {_MOST_ITEMS} properties")
        member = string_regex(1, None, place) + _COLON + self.value(others, f"{place}/*")
        return rf"\{{{self.more_items(member, 0, least, most)}\}}"


def _members(members: list[tuple[str, bool]]) -> str:
    """Members in their order, with commas between those that are there; (regex, required)."""
    first = next((i for i, (_, required) in enumerate(members) if required), None)
    if first is None:
        options = [
            member + "".join(f"(?:{_COMMA}{other})?" for other, _ in members[i + 1 :])
            for i, (member, _) in enumerate(members)
        ]
        return f"{_choice(options)}?"
    made = "".join(f"(?:{member}{_COMMA})?" for member, _ in members[:first]) + members[first][0]
    for member, required in members[first + 1 :]:
        made += f"{_COMMA}{member}" if required else f"(?:{_COMMA}{member})?"
    return made


def _choice(options: list[str]) -> str:
    return f"(?:{'|'.join(options)})"


def _anything(depth: int) -> str:
    """JSON of which arrays and objects lie in each other to ``depth``."""
    options = [string_regex(0, None, ""), NUMBER, "true", "false", "null"]
    if depth:
        inner = _anything(depth - 1)
        member = string_regex(1, None, "") + _COLON + inner
        options += [rf"\[(?:{inner}(?:{_COMMA}{inner})*)?\]",
                    rf"\{{(?:{member}(?:{_COMMA}{member})*)?\}}"]  # fmt: skip
    return _choice(options)


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _same(first: object, second: object) -> bool:
    """Whether two JSON values are equal: true is not 1, and 1.0 is 1."""
    return _key(first) == _key(second)


def _key(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, dict):
        return {name: _key(inner) for name, inner in value.items()}
    return [_key(inner) for inner in value] if isinstance(value, list) else ("", value)


def _is_of(value: object, type_: str) -> bool:
    if type_ in ("integer", "number"):
        whole = type_ == "number" or (isinstance(value, int | float) and value % 1 == 0)
        return isinstance(value, int | float) and not isinstance(value, bool) and whole
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    }  # fmt: skip
    return isinstance(value, kinds[type_])
