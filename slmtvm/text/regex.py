"""The regexes of tokenizer files, parsed: the part of Oniguruma's (Ruby's) syntax that they use.

Classes of characters are not interpreted here: ``slmtvm.text.characters`` asks the reference what
they match. What is beyond this part, such as back-references and look-behind, is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slmtvm.errors import UnsupportedTokenizerError

_CLASS_ESCAPES = "sSwWdDhHR"
_MOST_REPEATS = 64
_LITERAL_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}
_REFUSED_ESCAPES = "bBGXkgKyYNO"


@dataclass(frozen=True)
class Chars:
    """One character of a class, written as a regex of it."""

    pattern: str


@dataclass(frozen=True)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """The first that leads to a match."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """``least`` to ``most`` (None: any number) times, as many as possible unless ``lazy``.

    ``possessive``: none is given back for what follows.
    """

    item: Node
    least: int
    most: int | None
    lazy: bool = False
    possessive: bool = False


@dataclass(frozen=True)
class Look:
    """The next character is, or with ``negative`` is not, one of ``chars``; the end is none."""

    chars: Chars
    negative: bool


@dataclass(frozen=True)
class TextStart:
    pass


@dataclass(frozen=True)
class TextEnd:
    pass


Node = Chars | Sequence | Choice | Repeat | Look | TextStart | TextEnd


def parse_regex(pattern: str) -> Node:
    """The tree of ``pattern``; UnsupportedTokenizerError, with the place, where it is beyond."""
    parser = _Parser(pattern)
    node = parser.choice(ignore_case=False)
    if parser.at < len(pattern):
        raise parser.refused("an unbalanced )")
    return node


def literal(text: str) -> Node:
    """A tree that matches ``text`` alone."""
    return Sequence(tuple(Chars(_quoted(c)) for c in text))


def _quoted(character: str) -> str:
    return re.escape(character) if character.isascii() else character


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def refused(self, what: str) -> UnsupportedTokenizerError:
        return UnsupportedTokenizerError(
            f"the regex {self.pattern!r} has {what} at character {self.at}"
        )

    def starts(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if not self.starts(text):
            return False
        self.at += len(text)
        return True

    def choice(self, ignore_case: bool) -> Node:
        options = [self.sequence(ignore_case)]
        while self.take("|"):
            options.append(self.sequence(ignore_case))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def sequence(self, ignore_case: bool) -> Node:
        items: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            if self.take("(?i)"):  # to the end of the group
                ignore_case = True
                continue
            items.append(self.repeated(self.atom(ignore_case)))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def atom(self, ignore_case: bool) -> Node:
        character = self.pattern[self.at]
        if character == "(":
            return self.group(ignore_case)
        if character == "[":
            return self.chars(self.bracket(), ignore_case)
        if character == "\\":
            return self.escape(ignore_case)
        if character in "^$*+?{":
            raise self.refused(f"{character!r}, which is not compiled")
        self.at += 1
        return self.chars("." if character == "." else _quoted(character), ignore_case)

    @staticmethod
    def chars(pattern: str, ignore_case: bool) -> Chars:
        return Chars(f"(?i:{pattern})" if ignore_case else pattern)

    def group(self, ignore_case: bool) -> Node:
        begin = self.at
        for opening, negative in (("(?!", True), ("(?=", False)):
            if self.take(opening):
                inside = self.choice(ignore_case)
                self.close(begin)
                if not isinstance(inside, Chars):
                    raise self.refused("a look-ahead for more than one character")
                return Look(inside, negative)
        if self.take("(?i:"):
            ignore_case = True
        elif self.take("(?-i:"):
            ignore_case = False
        elif not self.take("(?:"):
            if self.starts("(?") and not re.match(r"\(\?<\w+>", self.pattern[self.at :]):
                raise self.refused(f"the group {self.pattern[self.at : self.at + 4]!r}")
            name = re.match(r"\((\?<\w+>)?", self.pattern[self.at :])
            assert name is not None
            self.at += name.end()
        node = self.choice(ignore_case)
        self.close(begin)
        return node

    def close(self, begin: int) -> None:
        if not self.take(")"):
            self.at = begin
            raise self.refused("an unbalanced (")

    def bracket(self) -> str:
        """A class in brackets, which may hold others."""
        begin = self.at
        depth = 0
        while self.at < len(self.pattern):
            character = self.pattern[self.at]
            self.at += 2 if character == "\\" else 1
            if character == "[":
                depth += 1
                self.take("^")
                if self.starts("]"):  # as the first one it is a character
                    self.at += 1
            elif character == "]":
                depth -= 1
                if depth == 0:
                    return self.pattern[begin : self.at]
        self.at = begin
        raise self.refused("an unbalanced [")

    def escape(self, ignore_case: bool) -> Node:
        rest = self.pattern[self.at :]
        found = re.match(r"\\[pP]\{\^?\w+\}|\\x\{[0-9A-Fa-f]+\}|\\x[0-9A-Fa-f]{1,2}"
                         r"|\\u[0-9A-Fa-f]{4}", rest)  # fmt: skip
        if found:
            self.at += found.end()
            return self.chars(found[0], ignore_case)
        character = rest[1:2]
        if character in _REFUSED_ESCAPES or character.isdigit() or not character:
            raise self.refused(f"'\\{character}', which is not compiled")
        if character == "Z":
            raise self.refused("'\\Z', which is not compiled")
        self.at += 2
        if character == "A":
            return TextStart()
        if character == "z":
            return TextEnd()
        if character == "R":
            raise self.refused("'\\R', which is not compiled")
        if character in _CLASS_ESCAPES:
            return self.chars(f"\\{character}", ignore_case)
        if character in _LITERAL_ESCAPES:
            return self.chars(f"\\{character}", ignore_case)
        if character.isalpha():
            self.at -= 2
            raise self.refused(f"'\\{character}', which is not compiled")
        return self.chars(_quoted(character), ignore_case)

    def repeated(self, node: Node) -> Node:
        while (bounds := self.bounds()) is not None:
            least, most, braces = bounds
            if isinstance(node, Look | TextStart | TextEnd):
                raise self.refused("a repeated assertion")
            lazy = self.take("?")
            # In Ruby's syntax a + after braces repeats once more.
            possessive = not lazy and not braces and self.take("+")
            node = Repeat(node, least, most, lazy, possessive)
        return node

    def bounds(self) -> tuple[int, int | None, bool] | None:
        for sign, least, most in (("*", 0, None), ("+", 1, None), ("?", 0, 1)):
            if self.take(sign):
                return least, most, False
        found = re.match(r"\{(\d*)(,?)(\d*)\}", self.pattern[self.at :])
        if not found or not (found[1] or found[3]):
            return None
        self.at += found.end()
        least = int(found[1] or 0)
        most_said = int(found[3]) if found[3] else None
        most = most_said if found[2] else least
        if max(least, most or 0) > _MOST_REPEATS or (most is not None and most < least):
            raise self.refused(f"{found[0]!r}: at most {_MOST_REPEATS} repeats, the fewer first,")
        return least, most, True
