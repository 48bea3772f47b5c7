"""JSON's strings as regexes: of a length, of a format, and those that a pattern matches."""

from __future__ import annotations

import json
import re

from slmtvm.errors import ConstraintError

# What a string holds without being escaped, as a class of Rust's regexes, and with it.
PLAIN = r'[^"\\\x00-\x1f\x7f-\x9f]'
CHARACTER = rf'(?:{PLAIN}|\\["\\/bfnrt])'
_MOST_LENGTH = 1000
_MONTHS = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"[12][0-9]{{3}}-{_MONTHS}"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:0[0-9]|1[0-4]):00)"
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_WORD = "[a-zA-Z0-9_]"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "email": rf"{_WORD}+(?:[.+-]{_WORD}+)*@[a-zA-Z0-9]+(?:-[a-zA-Z0-9]+)*(?:\.[a-zA-Z]{{2,}})+",
}  # fmt: skip
# Of a pattern's classes: what is of them in ECMAScript and Python alike.
_CLASSES = {"d": "0-9", "w": "a-zA-Z0-9_", "s": r"\x20"}
_OTHER_CLASSES = {
    "D": r"[\x20-\x7e&&[^0-9]]", "W": r"[\x20-\x7e&&[^a-zA-Z0-9_]]", "S": r"[\x21-\x7e]",
}  # fmt: skip
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_SPECIAL = set("()|?*+{}.^$[]\\")


def quoted(text: str) -> str:
    """A regex that matches ``text`` and nothing else."""
    return "".join(
        c if c.isascii() and (c.isalnum() or c in " _\"'<>=!,:;%@/`") else f"\\x{{{ord(c):x}}}"
        for c in text
    )


def literal(value: object) -> str:
    """A regex that matches the JSON of ``value``, objects and arrays with or without spaces."""
    if isinstance(value, dict):
        inside = ",[ ]?".join(f"{literal(k)}:[ ]?{literal(v)}" for k, v in value.items())
        return rf"\{{{inside}\}}"
    if isinstance(value, list):
        return rf"\[{',[ ]?'.join(map(literal, value))}\]"
    return quoted(json.dumps(value, ensure_ascii=False))


def string_regex(least: int, most: int | None, said: str) -> str:
    """Strings of ``least`` to ``most`` characters, with the quotes."""
    if max(least, most or 0) > _MOST_LENGTH:
        raise ConstraintError(f"{said}: lengths are compiled to {_MOST_LENGTH} characters")
    bounds = f"{{{least},{'' if most is None else most}}}"
    return f'"{CHARACTER}{bounds}"'


def pattern_regex(pattern: str, said: str) -> str:
    """Strings in which ``pattern`` is found (all of it where it has ^ and $), with the quotes.

    ``pattern`` is what ECMAScript, Python and Rust write alike. Raises ConstraintError, with
    ``said``, for what is beyond: looking around, back-references, anchors inside.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConstraintError(f"{said} is no regex: {error}") from error
    body, starts = (pattern[1:], True) if pattern.startswith("^") else (pattern, False)
    ends = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    inside = _Pattern(body[:-1] if ends else body, said).translate()
    around = f"{CHARACTER}*"
    if (starts or ends) and not (starts and ends) and "|" in body:
        raise ConstraintError(f"{said} has choices beside an anchor: put them into parentheses")
    if starts and ends and _has_open_choice(body):
        raise ConstraintError(f"{said} has choices beside its anchors: put them into parentheses")
    return f'"{"" if starts else around}(?:{inside}){"" if ends else around}"'


def _has_open_choice(body: str) -> bool:
    """Whether a | stands outside of parentheses, where an anchor belongs to one side alone."""
    depth = at = 0
    in_class = False
    while at < len(body):
        c = body[at]
        if c == "\\":
            at += 1
        elif in_class:
            in_class = c != "]"
        elif c == "[":
            in_class = True
        elif c in "()":
            depth += 1 if c == "(" else -1
        elif c == "|" and depth == 0:
            return True
        at += 1
    return False


class _Pattern:
    """A pattern over a string's characters as one over their JSON."""

    def __init__(self, pattern: str, said: str) -> None:
        self.pattern, self.said, self.at = pattern, said, 0

    def refused(self, what: str) -> ConstraintError:
        return ConstraintError(f"{self.said} {what}, which is not compiled")

    def take(self) -> str:
        if self.at == len(self.pattern):
            raise self.refused("ends early")
        self.at += 1
        return self.pattern[self.at - 1]

    def translate(self) -> str:
        made = []
        while self.at < len(self.pattern):
            c = self.take()
            if c == "\\":
                made.append(self.escape())
            elif c == "[":
                made.append(self.class_())
            elif c == ".":
                made.append(CHARACTER.replace("nrt", "t"))  # no line's end
            elif c in "^$":
                raise self.refused(f"has {c} inside")
            elif c == "(":
                made.append(self.group())
            elif c == "{" and not re.match(r"\d+(,\d*)?\}", self.pattern[self.at :]):
                made.append(r"\{")
            elif c in "{}," or c in _SPECIAL:  # of a number of times
                made.append(c)
            else:
                made.append(self.character(c))
        return "".join(made)

    def group(self) -> str:
        rest = self.pattern[self.at :]
        if not rest.startswith("?"):
            return "(?:"
        if rest.startswith("?:"):
            self.at += 2
            return "(?:"
        raise self.refused(f"has (?{rest[1:2]}")

    def character(self, c: str) -> str:
        return quoted(json.dumps(c, ensure_ascii=False)[1:-1])

    def escape(self) -> str:
        c = self.take()
        if c in _CLASSES:
            return f"[{_CLASSES[c]}]"
        if c in _OTHER_CLASSES:
            return f"(?:[{_OTHER_CLASSES[c]}&&{PLAIN}])"
        return self.character(self.escaped(c))

    def escaped(self, c: str) -> str:
        """The character that \\``c`` and what follows is."""
        if c in _CONTROLS:
            return _CONTROLS[c]
        if c in "xu":
            digits = self.pattern[self.at : self.at + (2 if c == "x" else 4)]
            self.at += len(digits)
            return chr(int(digits, 16))
        if c.isalnum():
            raise self.refused(f"has \\{c}")
        return c

    def class_(self) -> str:
        negative = self.pattern[self.at : self.at + 1] == "^"
        self.at += negative
        items: list[str] = []
        first = True
        while (c := self.take()) != "]" or first:
            first = False
            if c == "\\":
                c = self.take()
                if c in _CLASSES:
                    items.append(_CLASSES[c])
                    continue
                if c in _OTHER_CLASSES:
                    items.append(_OTHER_CLASSES[c])
                    continue
                c = self.escaped(c)
            code = f"\\x{{{ord(c):x}}}"
            if self.pattern[self.at : self.at + 1] == "-" and self.pattern[self.at + 1 :][
                :1
            ] not in ("]", ""):
                self.at += 1
                last = self.take()
                if last == "\\":
                    last = self.take()
                    if last in _CLASSES or last in _OTHER_CLASSES:
                        raise self.refused("has a range to a class")
                    last = self.escaped(last)
                code += f"-\\x{{{ord(last):x}}}"
            items.append(code)
        return f"[[{'^' if negative else ''}{''.join(items)}]&&{PLAIN}]"
