"""The import as a whole: file, frozen graph, steps, canonical model."""

from __future__ import annotations

from pathlib import Path

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.emit import Emitter, schedule
from slmtvm.importer.expand import expand
from slmtvm.importer.freeze import Frozen, freeze
from slmtvm.importer.graph import Graph
from slmtvm.importer.load import load
from slmtvm.importer.merge import merge_duplicates
from slmtvm.importer.outputs import choose_output
from slmtvm.importer.padding import assume_no_padding, padding_notes
from slmtvm.importer.report import elementwise_notes, family_of, hidden_size, layer_reports
from slmtvm.importer.roles import assign_roles
from slmtvm.importer.split import split_packed
from slmtvm.importer.steps import Attention, Embedding
from slmtvm.importer.tokens import Frame
from slmtvm.ir.model import CanonicalModel, KvSpec

_DEFAULT_CONTEXT = 1024  # where the graph does not say how far it reaches
_MAX_DEFAULT_CONTEXT = 4096
_PROBE_LENGTHS = (7, 11, 13, 17, 19, 23, 29, 31, 37)
_SHORT_PROBE_LENGTHS = (3, 4, 5, 6)  # for contexts that are shorter still
_MIN_CONTEXT = 4  # positions; two lengths that show what changes with the length


def import_onnx(path: str | Path, *, context: int | None = None) -> CanonicalModel:
    """The canonical model of an ONNX file, whatever exporter wrote it.

    ``context``: positions to compile for; by default the length of the model's own position
    tables, at most 4096, or 1024 where it has none.

    Raises InvalidModelError for a file that is damaged or contradicts itself, UnsupportedOpError
    for one that holds something that cannot be compiled, each naming the file and the node.
    """
    path = Path(path)
    graph = load(path)
    roles = assign_roles(graph)
    graph, padding = assume_no_padding(graph, roles.tokens.name)
    if context is not None and context < _MIN_CONTEXT:
        raise UnsupportedOpError(
            f"a context of {context} positions; at least {_MIN_CONTEXT} are needed", where=str(path)
        )
    short, longer = _two_lengths(graph, context)
    graph = merge_duplicates(expand(graph, roles, short))
    small = freeze(graph, roles, short)
    length = _context(context, small, freeze(graph, roles, longer), path)
    frame = Frame(small, freeze(graph, roles, length))
    output, notes = choose_output(frame)
    cover = Cover(frame, roles.tokens.name)
    rows = cover.run(output)
    return _canonical(cover, rows, output, padding, notes)


def _two_lengths(graph: Graph, context: int | None) -> tuple[int, int]:
    """Two short lengths up to the context; if possible ones that no constant has as a dimension."""
    most = context or max(_PROBE_LENGTHS)
    lengths = [n for n in _PROBE_LENGTHS if n <= most]
    lengths += [n for n in _SHORT_PROBE_LENGTHS[::-1] if n <= most]
    dims = {d for c in graph.initializers.values() for d in c.shape}
    free = [n for n in lengths if n not in dims]
    short, longer = sorted(free[:2] if len(free) > 1 else lengths[:2])
    return short, longer


def _context(asked: int | None, small: Frozen, longer: Frozen, path: Path) -> int:
    limits = [n for node, n in small.limits.items() if longer.limits.get(node) == n]
    limit = min(limits, default=None)
    if asked is None:
        return min(limit, _MAX_DEFAULT_CONTEXT) if limit is not None else _DEFAULT_CONTEXT
    if limit is not None and asked > limit:
        raise UnsupportedOpError(
            f"a context of {asked} positions; the model's own tables have {limit}", where=str(path)
        )
    return asked


def _canonical(
    cover: Cover, rows: str, output: str, padding: tuple[int, ...], notes: list[str]
) -> CanonicalModel:
    path = cover.frame.graph.path
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
    vocab = embeddings[0].vocab
    kind = "decoder" if masks == {"causal"} else "encoder"
    width = cover.frame.features(output)
    if kind == "decoder" and width != vocab:
        raise UnsupportedOpError(
            f"output {output!r} of a decoder has {width} features for each token where the "
            f"vocabulary has {vocab}; only logits of the vocabulary are supported",
            where=str(path),
        )
    emitter = Emitter(by_name, str(path))
    module = emitter.run(rows)
    return CanonicalModel(
        module=module,
        params=emitter.params,
        kind=kind,
        family=family_of(steps),
        context=cover.frame.full.length,
        vocab_size=vocab,
        hidden_size=width if kind == "encoder" else hidden_size(steps),
        num_heads=attentions[0].num_heads,
        kv=tuple(KvSpec(a.num_kv_heads, a.head_dim) for a in attentions),
        source=path,
        output=output,
        padding=padding,
        layers=tuple(layer_reports(by_name, order)),
        notes=(*padding_notes(padding), *notes, *elementwise_notes(steps)),
    )
