"""At which lengths a graph is frozen: a short one for its structure, the context for its tables."""

from __future__ import annotations

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.expand import expand
from slmtvm.importer.frame import Frame
from slmtvm.importer.freeze import freeze
from slmtvm.importer.frozen import Frozen
from slmtvm.importer.graph import Graph
from slmtvm.importer.merge import merge_duplicates
from slmtvm.importer.roles import Roles

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
    short, longer = _two_lengths(graph, context)
    graph = merge_duplicates(expand(graph, roles, short))
    small = freeze(graph, roles, short)
    limit = _limit(small, freeze(graph, roles, longer))
    length = min(limit or _DEFAULT_CONTEXT, most) if context is None else context
    if limit is not None and length > limit:
        raise UnsupportedOpError(
            f"a context of {context} positions; the model's own tables have {limit}",
            where=str(graph.path),
        )
    return Frame(small, freeze(graph, roles, length))


def _limit(small: Frozen, longer: Frozen) -> int | None:
    """How many positions the graph's tables have; None where there are none."""
    limits = [n for node, n in small.limits.items() if longer.limits.get(node) == n]
    return min(limits, default=None)


def _two_lengths(graph: Graph, context: int | None) -> tuple[int, int]:
    """Two short lengths up to the context; if possible ones that no constant has as a dimension."""
    most = context or max(_PROBE_LENGTHS)
    lengths = [n for n in _PROBE_LENGTHS if n <= most]
    lengths += [n for n in _SHORT_PROBE_LENGTHS[::-1] if n <= most]
    dims = {d for c in graph.initializers.values() for d in c.shape}
    free = [n for n in lengths if n not in dims]
    short, longer = sorted(free[:2] if len(free) > 1 else lengths[:2])
    return short, longer
