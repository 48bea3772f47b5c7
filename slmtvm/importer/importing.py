"""The import as a whole: file, frozen graph, steps, canonical model."""

from __future__ import annotations

import re
from pathlib import Path

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.emit import Emitter, schedule
from slmtvm.importer.freeze import Frozen, freeze
from slmtvm.importer.graph import Graph
from slmtvm.importer.load import load
from slmtvm.importer.merge import merge_duplicates
from slmtvm.importer.report import family_of, layer_reports
from slmtvm.importer.roles import Roles, assign_roles
from slmtvm.importer.split import split_packed
from slmtvm.importer.steps import Attention, Embedding, Linear
from slmtvm.importer.tokens import Frame
from slmtvm.ir.model import CanonicalModel, KvSpec

_DEFAULT_CONTEXT = 1024  # where the graph does not say how far it reaches
_MAX_DEFAULT_CONTEXT = 4096
_PROBE_LENGTHS = (7, 11, 13, 17, 19, 23, 29, 31, 37)
_CACHE_OUTPUT = re.compile(r"present.*|past.*")
_PREFERRED = ("logits", "last_hidden_state")


def import_onnx(path: str | Path, *, context: int | None = None) -> CanonicalModel:
    """The canonical model of an ONNX file, whatever exporter wrote it.

    ``context``: positions to compile for; by default the length of the model's own position
    tables, at most 4096, or 1024 where it has none.

    Raises InvalidModelError for a file that is damaged or contradicts itself, UnsupportedOpError
    for one that holds something that cannot be compiled, each naming the file and the node.
    """
    path = Path(path)
    graph = merge_duplicates(load(path))
    roles = assign_roles(graph)
    short, longer = _two_lengths(graph)
    small = freeze(graph, roles, short)
    length = _context(context, small, freeze(graph, roles, longer), path)
    frame = Frame(small, freeze(graph, roles, length))
    output, notes = _choose_output(frame)
    cover = Cover(frame, roles.tokens.name)
    rows = cover.run(output)
    return _canonical(cover, rows, roles, notes, path)


def _two_lengths(graph: Graph) -> tuple[int, int]:
    """Two short lengths that no constant of the graph has as a dimension."""
    dims = {d for c in graph.initializers.values() for d in c.shape}
    free = [n for n in _PROBE_LENGTHS if n not in dims] or list(_PROBE_LENGTHS)
    return free[0], free[1]


def _context(asked: int | None, small: Frozen, longer: Frozen, path: Path) -> int:
    limits = [n for node, n in small.limits.items() if longer.limits.get(node) == n]
    limit = min(limits, default=None)
    if asked is None:
        return min(limit, _MAX_DEFAULT_CONTEXT) if limit is not None else _DEFAULT_CONTEXT
    if asked <= longer.length:
        raise UnsupportedOpError(
            f"a context of {asked} positions; at least {longer.length + 1} are needed",
            where=str(path),
        )
    if limit is not None and asked > limit:
        raise UnsupportedOpError(
            f"a context of {asked} positions; the model's own tables have {limit}", where=str(path)
        )
    return asked


def _choose_output(frame: Frame) -> tuple[str, list[str]]:
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
    candidates.sort(key=lambda n: _PREFERRED.index(n) if n in _PREFERRED else len(_PREFERRED))
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


def _canonical(
    cover: Cover, rows: str, roles: Roles, notes: list[str], path: Path
) -> CanonicalModel:
    by_name = split_packed(cover.steps)
    order = schedule(by_name, rows)
    steps = [by_name[name] for name in order]
    embeddings = [s for s in steps if isinstance(s, Embedding)]
    attentions = [s for s in steps if isinstance(s, Attention)]
    masks = {a.mask for a in attentions}
    if len(embeddings) != 1 or not attentions or len(masks) != 1:
        raise UnsupportedOpError(
            f"{len(embeddings)} token embeddings and {len(attentions)} attentions with masks "
            f"{sorted(masks)}; a model with one embedding and one kind of attention is supported",
            where=str(path),
        )
    emitter = Emitter(by_name, str(path))
    module = emitter.run(rows)
    kind = "decoder" if masks == {"causal"} else "encoder"
    last = steps[-1]
    if kind == "decoder" and not isinstance(last, Linear):
        notes.append("the output is not that of a linear layer: no LM head was recognised")
    return CanonicalModel(
        module=module,
        params=emitter.params,
        kind=kind,
        family=family_of(steps),
        context=cover.frame.full.length,
        vocab_size=embeddings[0].vocab,
        hidden_size=embeddings[0].dim,
        num_heads=attentions[0].num_heads,
        kv=tuple(KvSpec(a.num_kv_heads, a.head_dim) for a in attentions),
        source=path,
        layers=tuple(layer_reports(by_name, order)),
        notes=tuple(notes),
    )
