"""Which outputs of the file are compiled: rows of tokens, and what is pooled of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.recognise.cover import Root
from slmtvm.importer.recognise.pooling import find_roots, has_rows

_CACHE_OUTPUT = re.compile(r"present.*|past.*")
_PREFERRED = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class FileOutput:
    """An output of the file: a row for each token, or one that follows from pooled ``roots``.

    ``inner``: another output is computed from it, and nobody asked for it by name.
    """

    name: str
    roots: tuple[Root, ...] = ()
    inner: bool = False


@dataclass(frozen=True)
class Chosen:
    """The outputs to compile, the one that is meant where one is asked for first; and the others
    with the reason why each is left out."""

    outputs: tuple[FileOutput, ...]
    left_out: dict[str, str]


def choose_outputs(frame: Frame, wanted: Sequence[str] | None = None) -> Chosen:
    """All outputs of floats that have a row for each token or one for the whole sequence, but for
    the cache; or those that are ``wanted``, in that order.

    Without names, logits come first, else hidden states, else rows of tokens before what is pooled
    of them. Raises UnsupportedOpError where there are none, and for one that is wanted and cannot
    be compiled, SlmError for a name that is none.
    """
    ports = [p.name for p in frame.graph.outputs if not _CACHE_OUTPUT.fullmatch(p.name)]
    where = str(frame.graph.path)
    for name in wanted or ():
        if name not in ports:
            raise SlmError(
                f"no output {name!r} to compile; the file has {', '.join(ports)}", where=where
            )
    found: dict[str, FileOutput] = {}
    problems: dict[str, SlmError] = {}
    for name in ports:
        try:
            found[name] = _output(frame, name)
        except SlmError as error:
            problems[name] = error
    for name in wanted or ():
        if name in problems:
            raise problems[name]
    if not found:
        if len(problems) == 1:
            raise next(iter(problems.values()))
        raise UnsupportedOpError(
            "no output has one row of numbers for each token, or one for all of them: "
            + "; ".join(map(str, problems.values())),
            where=where,
        )
    left_out = {name: str(error) for name, error in problems.items()}
    if wanted:
        left_out |= {name: "it is not asked for" for name in found if name not in wanted}
        return Chosen(tuple(found[name] for name in wanted), left_out)
    outputs = [
        replace(output, inner=any(_reads(frame, o, output.name) for o in found if o != output.name))
        for output in found.values()
    ]
    places = {name: place for place, name in enumerate(_PREFERRED)}
    # Of outputs without a telling name, hidden states come after what is made of them.
    first = min(outputs, key=lambda o: (places.get(o.name, len(places)), bool(o.roots), o.inner))
    return Chosen((first, *(o for o in outputs if o is not first)), left_out)


def _reads(frame: Frame, value: str, other: str) -> bool:
    """Whether ``value`` is computed from ``other``, or what that is moved from."""
    other = frame.trace(other).source
    todo, seen = [value], {value}
    while todo:
        node = frame.producers.get(todo.pop())
        fresh = [] if node is None else [i for i in frame.dynamic(node) if i not in seen]
        if other in fresh:
            return True
        seen.update(fresh)
        todo.extend(fresh)
    return False


def _output(frame: Frame, value: str) -> FileOutput:
    where = str(frame.graph.path)
    if value in frame.small.broken:
        raise UnsupportedOpError(frame.small.broken[value], where=where)
    if value not in frame.small.shapes:
        raise UnsupportedOpError(f"{value!r} does not depend on the tokens", where=where)
    if frame.small.dtypes[value].kind in "iub":
        raise UnsupportedOpError(
            f"{value!r} holds {frame.small.dtypes[value]}, not float", where=frame.where(value)
        )
    if frame.small.shapes[value] == frame.full.shapes[value] and not has_rows(frame, value):
        return FileOutput(value, find_roots(frame, value))
    frame.sequence_axis(value)
    return FileOutput(value)
