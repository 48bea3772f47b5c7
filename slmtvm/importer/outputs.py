"""Which output of the file is compiled."""

from __future__ import annotations

import re

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.frame import Frame

_CACHE_OUTPUT = re.compile(r"present.*|past.*")
_PREFERRED = ("logits", "last_hidden_state")


def choose_output(frame: Frame) -> tuple[str, list[str]]:
    """The output to compile: logits, else hidden states, else the first that has rows of tokens."""
    candidates: list[str] = []
    notes: list[str] = []
    problems: list[SlmError] = []
    for port in frame.graph.outputs:
        if _CACHE_OUTPUT.fullmatch(port.name):
            continue
        try:
            _check_rows(frame, port.name)
            candidates.append(port.name)
        except SlmError as error:
            problems.append(error)
            notes.append(f"output {port.name!r} is not emitted: {error}")
    # Of outputs without a telling name, hidden states come after what is made of them.
    inner = {n for n in candidates if any(_reads(frame, other, n) for other in candidates)}
    places = {name: place for place, name in enumerate(_PREFERRED)}
    candidates.sort(key=lambda n: (places.get(n, len(places)), n in inner))
    if not candidates:
        if len(problems) == 1:
            raise problems[0]
        raise UnsupportedOpError(
            "no output has one row of numbers for each token: " + "; ".join(map(str, problems)),
            where=str(frame.graph.path),
        )
    chosen, *rest = candidates
    notes.extend(f"output {name!r} is not emitted: only {chosen!r} is" for name in rest)
    return chosen, notes


def _reads(frame: Frame, value: str, other: str) -> bool:
    """Whether ``value`` is computed from ``other``."""
    todo, seen = [value], {value}
    while todo:
        node = frame.producers.get(todo.pop())
        fresh = [] if node is None else [i for i in frame.dynamic(node) if i not in seen]
        if other in fresh:
            return True
        seen.update(fresh)
        todo.extend(fresh)
    return False


def _check_rows(frame: Frame, value: str) -> None:
    if value in frame.small.broken:
        raise UnsupportedOpError(frame.small.broken[value], where=str(frame.graph.path))
    if value not in frame.small.shapes:
        raise UnsupportedOpError(
            f"{value!r} does not depend on the tokens", where=str(frame.graph.path)
        )
    frame.sequence_axis(value)
    if frame.small.dtypes[value].kind in "iub":
        raise UnsupportedOpError(
            f"{value!r} holds {frame.small.dtypes[value]}, not float", where=frame.where(value)
        )
