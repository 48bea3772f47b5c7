"""A JSON schema (2020-12) as a regex of texts that are valid by it.

All that is written is valid; not all that is valid can be written: properties come in the
schema's order, and others only where nothing else is said; strings escape what they must; integers
have up to 15 digits. A keyword that is not known here is refused by name: that it would be left out
must not go unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmtvm.errors import ConstraintError
from slmtvm.text.constraint.json_strings import (
    FORMATS,
    literal,
    pattern_regex,
    string_regex,
)
from slmtvm.text.constraint.number_ranges import INTEGER, NUMBER, integer_regex, number_regex
from slmtvm.text.constraint.schema_reader import (
    ANNOTATIONS,
    COMBINED,
    MOST_REFERENCES,
    OF_TYPE,
    Schema,
    SchemaReader,
    is_of_type,
    same_value,
)

_MOST_ITEMS = 200
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


class _Compiler(SchemaReader):
    def __init__(self, root: Schema, where: str) -> None:
        super().__init__(root, where)
        self.open: list[str] = []  # references that are being followed

    def value(self, schema: Schema, place: str) -> str:
        if schema is True or schema == {}:
            return _anything(_ANY_DEPTH)
        if not isinstance(schema, dict):
            what = "false allows nothing" if schema is False else f"{schema!r} is no schema"
            raise self.refused(place, what)
        asked = {name: value for name, value in schema.items() if name not in ANNOTATIONS}
        if not asked:
            return _anything(_ANY_DEPTH)
        combined = [name for name in COMBINED if name in asked]
        if combined:
            return self.combination(combined[0], asked, place)
        types = self.types(asked, place)
        known = set().union({"type"}, *(OF_TYPE[type_] for type_ in types))
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

    def listed(self, name: str, schema: dict[str, Any], others: set[str], place: str) -> str:
        self.alone(name, others - {"type", "const" if name == "enum" else "enum"}, place)
        values = schema["enum"] if name == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise self.refused(place, "enum must be a list of values")
        if name == "enum" and "const" in others:
            values = [value for value in values if same_value(value, schema["const"])]
        if "type" in others:
            types = self.types({"type": schema["type"]}, place)
            values = [value for value in values if any(is_of_type(value, t) for t in types)]
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
        if self.followed > MOST_REFERENCES:
            raise self.refused(place, f"more than {MOST_REFERENCES} references are followed")
        self.open.append(given)
        made = self.value(self.found(given, place), given)
        self.open.pop()
        return made

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
