"""At which lengths a graph is frozen: a short one for its structure, the context for its tables."""

from __future__ import annotations

from collections.abc import Sequence

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.frame.decisions import written_for
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.freeze.freeze import freeze
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.roles import Roles
from slmtvm.importer.graph import Graph
from slmtvm.importer.rewrite.integer_products import products_of_floats
from slmtvm.importer.rewrite.merge import merge_duplicates

MAX_DEFAULT_CONTEXT = 4096
_DEFAULT_CONTEXT = 1024  # where the graph does not say how far it reaches
_PROBE_LENGTHS = (7, 11, 13, 17, 19, 23, 29, 31, 37)
_SHORT_PROBE_LENGTHS = (3, 4, 5, 6)  # for contexts that are shorter still
_MIN_CONTEXT = 4  # positions; two lengths that show what changes with the length


def freeze_twice(
    graph: Graph, roles: Roles, context: int | None, *, most: int = MAX_DEFAULT_CONTEXT
) -> Frame:
    """``graph``, its composite operators written out, at a short length and at the context.

    Where that is not given, it is the length of the graph's own tables, or _DEFAULT_CONTEXT where
    it has none, and at most ``most``. Raises UnsupportedOpError for a context that cannot be had.
    """
    if context is not None and context < _MIN_CONTEXT:
        raise UnsupportedOpError(
            f"a context of {context} positions; at least {_MIN_CONTEXT} are needed",
            where=str(graph.path),
        )
    if roles.length is not None:
        _check_length(graph, roles.length, context)
        most = min(most, roles.length)
    short, longer = _two_lengths(graph, context or most)
    try:
        written = _written(graph, roles, short, context or short)
        small = freeze(written, roles, short)
    except SlmError as error:
        if roles.length is None:
            _check_takes_one(graph, roles, short, context)
            raise
        if context in (None, roles.length):
            return _frozen_once(graph, roles, roles.length)
        raise _baked(graph, roles.length, error) from error
    graph = written
    tries = _Tries(graph, roles)
    ends = _ends(small, freeze(graph, roles, longer))
    if context is None:
        return Frame(small, tries.longest(longer, ends, most))
    full = tries.freeze(context)
    if full is None:
        reason, longest = tries.failure, tries.longest_below(context, short, ends)
        raise UnsupportedOpError(
            f"a context of {context} positions; the model's own tables have {longest.length}. "
            f"Beyond that: {reason}",
            where=str(graph.path),
        ) from reason
    return Frame(small, full)


def _written(graph: Graph, roles: Roles, short: int, context: int) -> Graph:
    return merge_duplicates(products_of_floats(written_for(graph, roles, short, context)))


def _check_takes_one(graph: Graph, roles: Roles, short: int, context: int | None) -> None:
    """Raise where a graph that cannot be had for ``short`` tokens can for the ``context``."""
    if context is None:
        return
    try:
        freeze(_written(graph, roles, context, context), roles, context)
    except SlmError:
        return
    raise UnsupportedOpError(
        f"the graph takes {context} tokens and not {short}, and its inputs say that it takes any: "
        f"give them the length {context} (onnxruntime.tools.make_dynamic_shape_fixed) if that is "
        "the one that it was exported for",
        where=str(graph.path),
    )


def _frozen_once(graph: Graph, roles: Roles, length: int) -> Frame:
    """A graph whose own constants hold the one length that its inputs have."""
    frozen = freeze(_written(graph, roles, length, length), roles, length)
    return Frame(frozen, frozen)


class _Tries:
    """A graph frozen at some lengths, of which it has no more than its tables allow."""

    def __init__(self, graph: Graph, roles: Roles) -> None:
        self._graph, self._roles = graph, roles
        self.failure: SlmError | None = None  # the latest one

    def freeze(self, length: int) -> Frozen | None:
        """The graph for ``length`` tokens, or None where it cannot be that long."""
        try:
            return freeze(self._graph, self._roles, length)
        except SlmError as error:
            self.failure = error
            return None

    def longest(self, least: int, ends: Sequence[int], most: int) -> Frozen:
        """The graph at the length of its tables, or where it has none at the default one, and at
        most at ``most``; it can be frozen for ``least`` tokens."""
        found = self._at_an_end([end for end in ends if least <= end < most])
        if found is not None:
            return found
        ended = any(end >= most for end in ends) or most == self._roles.length
        wanted = most if ended else min(_DEFAULT_CONTEXT, most)
        return self.freeze(wanted) or self.longest_below(wanted, least, ())

    def longest_below(self, beyond: int, least: int, ends: Sequence[int]) -> Frozen:
        """The graph at its longest, where it can be frozen for ``least`` tokens and not for
        ``beyond``."""
        at_an_end = self._at_an_end([end for end in ends if least <= end < beyond])
        if at_an_end is not None:
            return at_an_end
        found = freeze(self._graph, self._roles, least)
        while beyond - found.length > 1:
            middle = (found.length + beyond) // 2
            tried = self.freeze(middle)
            if tried is None:
                beyond = middle
            else:
                found = tried
        return found

    def _at_an_end(self, ends: Sequence[int]) -> Frozen | None:
        """The graph at the first of these lengths behind which it cannot be frozen.

        What looks like a table of positions is one only there: a bias by distance, too, may read
        its rows in order for a while.
        """
        for end in sorted(ends):
            if self.freeze(end + 1) is None:
                return self.freeze(end)
        return None


def _check_length(graph: Graph, length: int, context: int | None) -> None:
    """Raise where no ``context`` can be had of inputs that have a fixed ``length``."""
    if length < max(context or 0, _MIN_CONTEXT):
        wanted = f"{_MIN_CONTEXT} or more" if context is None else str(context)
        raise UnsupportedOpError(
            f"the inputs have a fixed length of {length}, and {wanted} tokens are asked for; "
            "export the model with a dynamic length",
            where=str(graph.path),
        )


def _baked(graph: Graph, length: int, reason: SlmError) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"the inputs have a fixed length of {length}, which the graph's own constants hold too: "
        f"compile for a context of {length}, or export the model with a dynamic length. Of fewer "
        f"tokens, {reason}",
        where=str(graph.path),
    )


def _ends(small: Frozen, longer: Frozen) -> list[int]:
    """The lengths of what is read as tables of positions are, at two lengths."""
    return sorted({n for node, n in small.ends.items() if longer.ends.get(node) == n})


def _two_lengths(graph: Graph, most: int) -> tuple[int, int]:
    """Two short lengths up to ``most``; if possible ones that no constant has as a dimension."""
    lengths = [n for n in _PROBE_LENGTHS if n <= most]
    lengths += [n for n in _SHORT_PROBE_LENGTHS[::-1] if n <= most]
    dims = {d for c in graph.initializers.values() for d in c.shape}
    free = [n for n in lengths if n not in dims]
    short, longer = sorted(free[:2] if len(free) > 1 else lengths[:2])
    return short, longer
