"""Branches that a sequence's length chooses: those of the context are compiled, for all lengths.

A file may take one branch for short sequences and another one for long ones: Phi-3's two tables of
rotary angles, for one. What is compiled has one of them, so that a position's numbers do not change
as a sequence grows: the one that the file takes for a sequence as long as the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from slmtvm.errors import SlmError
from slmtvm.importer.expand import expand
from slmtvm.importer.freeze.freeze import freeze, truth
from slmtvm.importer.freeze.infer import MIN_ELEMENTS
from slmtvm.importer.freeze.roles import Roles
from slmtvm.importer.graph import Decision, Graph, Port, needed

_LONGEST = 1 << 20  # tokens of a sequence whose branch is asked for


def written_for(graph: Graph, roles: Roles, short: int, context: int) -> Graph:
    """``graph`` written out as ``expand`` does at ``short`` tokens, but with the branches that a
    sequence of ``context`` tokens takes. ``Decision.since`` says from which length on it does."""
    chosen: dict[str, bool] = {}
    while True:
        written = expand(graph, roles, short, chosen=chosen)
        other = {
            decision.condition: not decision.outcome
            for decision in written.decisions
            if decision.condition not in chosen
            and _outcome(written, roles, decision, context) == (not decision.outcome)
        }
        if not other:
            break
        chosen.update(other)
    decisions = tuple(
        replace(d, since=_change(written, roles, d, short, context)) if d.condition in chosen else d
        for d in written.decisions
    )
    return replace(written, decisions=decisions)


def exact_from(graph: Graph) -> int:
    """The shortest sequence for which the file itself takes all branches that were chosen."""
    return max((decision.since for decision in graph.decisions), default=1)


def decision_notes(graph: Graph, roles: Roles, context: int) -> Iterator[str]:
    """What was chosen by the ``context``, and what would choose the other branch."""
    changes = {d: _next_change(graph, roles, d, context) for d in graph.decisions}
    for place in dict.fromkeys(d.where for d in graph.decisions):
        here = [d for d in graph.decisions if d.where == place]
        since = max(d.since for d in here)
        ends = [end for d in here if (end := changes[d]) is not None]
        node = place.removeprefix(f"{graph.path}: ")
        if since > 1:
            yield (
                f"{node}: compiled with what the file takes for sequences of {since} tokens and "
                f"more; for shorter ones it takes another branch, which a --context of up to "
                f"{since - 1} compiles"
            )
        if ends:
            end = min(ends)
            yield (
                f"{node}: compiled with what the file takes for sequences of up to {end - 1} "
                f"tokens; a --context of {end} or more compiles the branch for longer ones"
            )


def _outcome(graph: Graph, roles: Roles, decision: Decision, length: int) -> bool | None:
    """What the condition is for ``length`` tokens; None where that cannot be computed."""
    nodes = needed(graph.nodes, [decision.condition])
    alone = replace(
        graph,
        nodes=nodes,
        outputs=(Port(decision.condition, 0, None),),
        declared={},
        decisions=(),
    )
    try:
        return truth(freeze(alone, roles, length, most=MIN_ELEMENTS), decision.condition)
    except SlmError:
        return None


def _change(graph: Graph, roles: Roles, decision: Decision, short: int, long: int) -> int:
    """The first length behind ``short`` whose condition is not that of ``short``, up to ``long``,
    where it is not either."""
    before = _outcome(graph, roles, decision, short)
    while long - short > 1:
        middle = (short + long) // 2
        if _outcome(graph, roles, decision, middle) == before:
            short = middle
        else:
            long = middle
    return long


def _next_change(graph: Graph, roles: Roles, decision: Decision, context: int) -> int | None:
    """The first length behind ``context`` for which the file takes another branch, or None."""
    short, long = context, 2 * context
    while long <= _LONGEST:
        outcome = _outcome(graph, roles, decision, long)
        if outcome is None:
            return None
        if outcome != decision.outcome:
            return _change(graph, roles, decision, short, long)
        short, long = long, 2 * long
    return None
