"""The import as a whole: file, frozen graph, steps, canonical model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tvm
from tvm import relax

from slmtvm.embedding_modules import embedding_modules
from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.importer.emit.cut_zeros import cut_notes, cut_zeros
from slmtvm.importer.emit.emit import Emitter, schedule
from slmtvm.importer.emit.feature_regions import structures
from slmtvm.importer.emit.report import elementwise_notes, family_of, hidden_size, layer_reports
from slmtvm.importer.emit.split import split_packed
from slmtvm.importer.encoder_decoder import (
    TOKENS_OF_BOTH,
    check_uses,
    common_source,
    encoder_file,
    freeze_with_ones,
    has_both,
    join,
    needs_encoder,
    remember_all,
    source_constants,
    split,
    with_stand_ins,
    written_out,
)
from slmtvm.importer.faults import named
from slmtvm.importer.frame.decisions import decision_notes, exact_from
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.frame.lengths import freeze_twice
from slmtvm.importer.freeze.roles import PAIRS, Roles, assign_roles
from slmtvm.importer.graph import Graph
from slmtvm.importer.read.load import load
from slmtvm.importer.recognise.attention.cross import Source
from slmtvm.importer.recognise.cover import Cover
from slmtvm.importer.recognise.masked import Probe, after_mask, check_mask_input, under_mask
from slmtvm.importer.recognise.masking import mask_kind
from slmtvm.importer.recognise.outputs import FileOutput, choose_outputs
from slmtvm.importer.recognise.pooling import cover_pooled, pooled_steps
from slmtvm.importer.recognise.recognisers import recognise, recognise_after
from slmtvm.importer.recognise.steps import Attention, Embedding, Pool, Rows, Same, Step
from slmtvm.importer.rewrite.earlier_tokens import split_earlier
from slmtvm.importer.rewrite.early_pointwise import compute_before_moving
from slmtvm.importer.rewrite.embedding_output import with_embedding
from slmtvm.importer.rewrite.final_token import take_final_row
from slmtvm.importer.rewrite.four_bit_floats import expand_four_bit_floats
from slmtvm.importer.rewrite.half_clamps import drop_half_clamps
from slmtvm.importer.rewrite.halves import widen
from slmtvm.importer.rewrite.integer_products import products_of_floats
from slmtvm.importer.rewrite.padding import (
    Padding,
    assume_no_padding,
    check_tokens_used,
    padding_notes,
)
from slmtvm.importer.rewrite.softmax import join_softmax
from slmtvm.importer.rewrite.static_integers import static_products
from slmtvm.ir.model import MASKS, CanonicalModel, KvSpec, Output

_MOST_SOURCE = 512  # tokens of an encoder-decoder's source, where none are asked for
_FindMask = Callable[[], str]  # the kind of mask that a file has; raises where it has none


def import_onnx(
    path: str | Path,
    *,
    context: int | None = None,
    source_context: int | None = None,
    mask: str = "none",
    encoder: str | Path | None = None,
    outputs: Sequence[str] | None = None,
) -> CanonicalModel:
    """The canonical model of an ONNX file, whatever exporter wrote it.

    ``context``: positions to compile for; by default the length of the model's own position
    tables, at most 4096, or 1024 where it has none. A decoder's file that reads the hidden states
    of an encoder is imported with the encoder's file: ``encoder``, or the one that lies beside it.
    ``source_context``: the most tokens of an encoder-decoder's source; by default as ``context``,
    but at most 512.
    ``mask``: one of MASKS; "arbitrary" asks for what a mask of tokens does in this file.
    ``outputs``: the names of those to compile, by default all that hold floats for each token or
    for the whole sequence, but for the cache.

    Raises InvalidModelError for a file that is damaged or contradicts itself, UnsupportedOpError
    for one that holds something that cannot be compiled, and InternalError where the importer
    itself is at fault, each naming the file and the node.
    """
    if mask not in MASKS:
        raise SlmError(f"must be one of {', '.join(MASKS)}, not {mask!r}", where="mask")
    given = None if encoder is None else Path(encoder)
    with named(Path(path)):
        model, find_mask = _import(Path(path), context, source_context, given, outputs)
        return replace(model, mask=find_mask()) if mask == "arbitrary" else model


def import_with_mask(
    path: str | Path, *, context: int | None = None, encoder: str | Path | None = None
) -> tuple[CanonicalModel, str]:
    """``import_onnx`` with the mask that the file has, or "none"; and why it has none, or ""."""
    given = None if encoder is None else Path(encoder)
    with named(Path(path)):
        model, find_mask = _import(Path(path), context, encoder=given)
        try:
            return replace(model, mask=find_mask()), ""
        except UnsupportedOpError as error:
            return model, str(error)


def _import(
    path: Path,
    context: int | None,
    source_context: int | None = None,
    encoder: Path | None = None,
    outputs: Sequence[str] | None = None,
) -> tuple[CanonicalModel, _FindMask]:
    graph = _load(path)
    modules = embedding_modules(path)
    if modules.compiled:
        graph = with_embedding(graph, modules)
    if needs_encoder(graph):
        graph = join(_load(encoder_file(path, encoder)), graph)
    elif encoder is not None:
        raise SlmError(
            f"an encoder is given ({encoder}), and this model reads none: leave it out",
            where=str(path),
        )
    elif has_both(graph):
        graph = written_out(graph)
    if has_both(graph):
        return _import_both(graph, context, source_context, outputs)
    if source_context is not None:
        raise SlmError(
            f"a source of {source_context} tokens is asked for, and this model reads no source: "
            "leave it out",
            where=str(path),
        )
    roles = assign_roles(graph)
    check_tokens_used(graph, roles.tokens.name)
    graph, final_token = take_final_row(graph, roles.tokens.name)
    graph, padding = assume_no_padding(graph, roles.tokens.name)
    graph, earlier, not_moved = split_earlier(graph, roles.tokens, roles.values)
    roles = replace(roles, earlier=earlier)
    roles, cover, found = _cover_graph(graph, roles, context, outputs)
    frame = cover.frame
    model = _canonical(_Recognised(cover, found.rows), found, Emitter(str(path)))
    names = tuple(output.name for output in found.outputs)

    def find_mask() -> str:
        check_mask_input(graph, roles)

        def kind(tests: Sequence[str]) -> str:
            probe = Probe(cover, names, *under_mask(frame, roles, tests))
            return mask_kind([probe], rounds_rows_together=model.kind == "encoder")

        return _kind_of(kind, padding)

    chosen = decision_notes(frame.graph, roles, frame.full.length)
    counted = tuple(sorted({*padding.tokens, *not_moved}))
    notes = [
        *chosen,
        *_length_notes(frame),
        *_mask_notes(roles),
        *padding_notes(counted),
        *model.notes,
    ]
    model = replace(model, padding=counted, final_token=final_token, notes=tuple(notes))
    return model, find_mask


def _mask_notes(roles: Roles) -> Iterator[str]:
    """What was assumed of inputs that say which tokens each token sees."""
    for name, (role, _) in roles.fixed.items():
        if role == PAIRS:
            yield f"input {name!r} is compiled in: each token sees itself and those before it"


def _length_notes(frame: Frame) -> Iterator[str]:
    """What is assumed of a graph that is known at one length."""
    if frame.small is frame.full:
        yield (
            f"the graph holds its length, {frame.full.length} tokens: shorter sequences are taken "
            "for what it makes of them when they are padded and the padding is hidden"
        )


def _load(path: Path) -> Graph:
    graph = static_products(expand_four_bit_floats(load(path)))
    return join_softmax(widen(drop_half_clamps(graph)))


@dataclass(frozen=True)
class _Found:
    """The outputs that are compiled, their rows, and why others are not."""

    outputs: tuple[FileOutput, ...]
    rows: tuple[Rows, ...]
    left_out: dict[str, str]


def _cover_graph(
    graph: Graph, roles: Roles, context: int | None, outputs: Sequence[str] | None
) -> tuple[Roles, Cover, _Found]:
    """Find steps for the outputs of an encoder with its token types as an input, or for those of
    another graph with zeros in their place."""
    note = ""
    if (typed := roles.with_segments()) is not None:
        assert typed.segments is not None
        try:
            frame = freeze_twice(graph, typed, context)
            cover = Cover(frame, typed.tokens.name, recognise, typed.segments.name, typed.earlier)
            found = _cover_outputs(cover, outputs)
            if _Recognised(cover, found.rows).mask != "causal":
                return typed, cover, found
        except UnsupportedOpError as error:
            note = f"token types are taken for zeros: {error}"
    frame = freeze_twice(graph, roles, context)
    cover = Cover(frame, roles.tokens.name, recognise, earlier=roles.earlier)
    found = _cover_outputs(cover, outputs)
    if note:
        cover.note(note)
    return roles, cover, found


def _cover_outputs(cover: Cover, wanted: Sequence[str] | None) -> _Found:
    """Find steps for the outputs to compile.

    Of those that nobody asked for, one beside the first that cannot be compiled is left out.
    """
    chosen = choose_outputs(cover.frame, wanted)
    found: dict[FileOutput, Rows] = {}
    left_out = dict(chosen.left_out)
    for output in chosen.outputs:
        try:
            found[output] = _cover_output(cover, output)
            _check_pools(cover)
        except UnsupportedOpError as error:
            if wanted or not found:
                raise
            left_out[output.name] = str(error)
    return _Found(tuple(found), tuple(found.values()), left_out)


def _check_pools(cover: Cover) -> None:
    """Raise where a graph that is known at one length alone pools rows by their number."""
    if cover.frame.small is not cover.frame.full:
        return
    for rows, step in cover.steps.items():
        if isinstance(step, Pool) and step.how != "first":
            raise UnsupportedOpError(
                f"rows are pooled ({step.how}) by a graph that takes {cover.frame.small.length} "
                "tokens alone, so that what it makes of fewer is not known; export it with a "
                "dynamic length",
                where=cover.frame.where(rows),
            )


def _cover_output(cover: Cover, output: FileOutput) -> Rows:
    if output.roots:
        return cover_pooled(cover, output.name, output.roots)
    return cover.run(output.name)


def _kind_of(kind: Callable[[Sequence[str]], str], padding: Padding) -> str:
    """The ``kind`` of mask where hidden tokens are padding, as tokenizers have it, or else not."""
    try:
        return kind(padding.tests)
    except UnsupportedOpError:
        if not padding.tests:
            raise
        return kind(())


def _import_both(
    graph: Graph,
    context: int | None,
    source_context: int | None,
    outputs: Sequence[str] | None,
) -> tuple[CanonicalModel, _FindMask]:
    """An encoder and a decoder: the decoder's model, and the function that reads its source."""
    for tokens in TOKENS_OF_BOTH:
        check_tokens_used(graph, tokens)
    halves = split(compute_before_moving(products_of_floats(graph)))
    roles = assign_roles(halves.encoder)
    early, padding = assume_no_padding(halves.encoder, roles.tokens.name)
    frame = freeze_twice(early, roles, source_context, most=_MOST_SOURCE)
    late, stand_ins = with_stand_ins(halves, frame.small)
    late_roles = assign_roles(late)
    late, late_padding = assume_no_padding(late, late_roles.tokens.name)
    late_frame = freeze_twice(late, late_roles, context)
    ones = freeze_with_ones(late_frame, late_roles, stand_ins)
    source = Source(Cover(frame, roles.tokens.name, recognise), stand_ins, ones)
    check_uses(late_frame, stand_ins)
    cover = Cover(late_frame, late_roles.tokens.name, recognise_after(source))
    found = _cover_outputs(cover, outputs)
    names = tuple(output.name for output in found.outputs)
    hidden = common_source(frame, source.used)
    last = remember_all(source, source.cover.run(hidden))
    source.cover.find(last)
    emitter = Emitter(str(graph.path))
    model = _canonical(_Recognised(cover, found.rows), found, emitter)
    model = _with_source(model, _Recognised(source.cover, (last,)), emitter)

    def find_mask() -> str:
        check_mask_input(halves.encoder, roles)

        def kind(tests: Sequence[str]) -> str:
            masked, masks = under_mask(frame, roles, tests)
            # The decoder's graph is frozen at two lengths of its own, both after the short source.
            after = after_mask(late_frame, late_roles, source_constants(halves, masked[0]))
            probes = [
                Probe(source.cover, (hidden,), masked, masks),
                Probe(cover, names, after, (masks[0], masks[0]), of_source=True),
            ]
            return mask_kind(probes, rounds_rows_together=True)

        return _kind_of(kind, padding)

    counted = tuple(sorted({*padding.tokens, *late_padding.tokens}))
    notes = [*padding_notes(counted), *model.notes]
    return replace(model, padding=counted, notes=tuple(notes)), find_mask


class _Recognised:
    """The steps of one function, and which of them its parts are."""

    def __init__(self, cover: Cover, rows: Sequence[Rows]) -> None:
        self.cover, self.rows = cover, rows
        whole = split_packed(cover.steps)
        self.structures = structures(whole, rows)
        self.by_name, cuts = cut_zeros(whole, rows)
        self.cut_notes = cut_notes(cuts)
        self.order = schedule(self.by_name, rows)
        self.steps: Sequence[Step] = [self.by_name[name] for name in self.order]
        self.attentions = [s for s in self.steps if isinstance(s, Attention)]
        lookups = [s for s in self.steps if isinstance(s, Embedding)]
        embeddings = [s for s in lookups if s.by == "token"]
        self.segments = max((s.vocab for s in lookups if s.by == "segment"), default=0)
        masks = {a.mask for a in self.attentions}
        if len(embeddings) > 1:
            tables = ", ".join(sorted({repr(e.table.weight.name) for e in embeddings}))
            raise UnsupportedOpError(
                f"rows of several tables are looked up by the tokens ({tables}) and meet in a way "
                "that is not recognised; one table is supported, or integers with their scales",
                where=str(cover.frame.graph.path),
            )
        if len(embeddings) != 1 or not self.attentions:
            raise UnsupportedOpError(
                f"{len(embeddings)} token embeddings and {len(self.attentions)} attentions; a "
                "model with one embedding, and with attention, is supported",
                where=str(cover.frame.graph.path),
            )
        self.embedding = embeddings[0]
        # Where some rows see all of the sequence, it must be there as a whole.
        self.mask = masks.pop() if len(masks) == 1 else "bidirectional"

    @property
    def needs_all(self) -> bool:
        """Whether an output is of all rows together, not of each token or of the last one."""
        return any(isinstance(step, Pool) and step.how != "last" for step in self.steps)

    @property
    def by_token(self) -> list[Step]:
        """The steps that compute a row for each token."""
        pooled = pooled_steps(self.by_name, self.order)
        return [self.by_name[name] for name in self.order if name not in pooled]


def _canonical(found: _Recognised, chosen: _Found, emitter: Emitter) -> CanonicalModel:
    frame = found.cover.frame
    path, vocab = frame.graph.path, found.embedding.vocab
    kind = "decoder" if found.mask == "causal" and not found.needs_all else "encoder"
    if kind == "decoder":
        _for_every_token(found)
        chosen = _without_inner(chosen)
    main = emitter.function("main", found.by_name, chosen.rows)
    returned = main.ret_ty
    types = list(returned.fields) if isinstance(returned, relax.TupleType) else [returned]
    outputs = [
        Output(output.name, int(type_.shape.values[1]), pooled=bool(output.roots))
        for output, type_ in zip(chosen.outputs, types, strict=True)
    ]
    notes = [f"output {name!r} is not emitted: {why}" for name, why in chosen.left_out.items()]
    return CanonicalModel(
        module=tvm.IRModule({"main": main}),
        params=emitter.params,
        kind=kind,
        family=family_of(found.by_token),
        context=frame.full.length,
        exact_from=exact_from(frame.graph),
        vocab_size=vocab,
        hidden_size=hidden_size(found.by_token),
        num_heads=found.attentions[0].num_heads,
        kv=tuple(KvSpec(a.num_kv_heads, a.head_dim, a.window or a.chunk) for a in found.attentions),
        source=path,
        outputs=tuple(outputs),
        left_out=chosen.left_out,
        segments=found.segments,
        layers=tuple(layer_reports(found.by_name, found.order)),
        structures=found.structures,
        notes=(
            *notes,
            *found.cover.notes,
            *found.cut_notes,
            *elementwise_notes(found.by_token),
        ),
    )


def _for_every_token(found: _Recognised) -> None:
    """What a decoder makes of its last token it makes of every one: the pooling goes."""
    for name in found.order:
        step = found.by_name[name]
        if isinstance(step, Pool):
            found.by_name[name] = Same(step.x)


def _without_inner(chosen: _Found) -> _Found:
    """A decoder's outputs for every token that it generates: not what it computes on the way."""
    kept = [i for i, o in enumerate(chosen.outputs) if i == 0 or not o.inner]
    inner = [o.name for i, o in enumerate(chosen.outputs) if i not in kept]
    why = "it is a state inside a decoder, whose other outputs are made of it: ask for it by name"
    return _Found(
        tuple(chosen.outputs[i] for i in kept),
        tuple(chosen.rows[i] for i in kept),
        chosen.left_out | dict.fromkeys(inner, why),
    )


def _with_source(model: CanonicalModel, encoder: _Recognised, emitter: Emitter) -> CanonicalModel:
    """``model``, a decoder, with the function that reads its source."""
    theirs = (encoder.embedding.vocab, hidden_size(encoder.steps))
    ours = (model.vocab_size, model.hidden_size)
    if theirs != ours or encoder.mask != "bidirectional":
        raise UnsupportedOpError(
            f"an encoder with {encoder.mask} attention, a vocabulary of {theirs[0]} and "
            f"{theirs[1]} hidden features for a decoder with {ours[0]} and {ours[1]}; it must be "
            "bidirectional and have the decoder's sizes",
            where=str(model.source),
        )
    source = emitter.function("source", encoder.by_name, encoder.rows)
    return replace(
        model,
        module=tvm.IRModule({"main": model.module["main"], "source": source}),
        params=emitter.params,
        kind="encoder-decoder",
        family="encoder-decoder",
        source_context=encoder.cover.frame.full.length,
        layers=(*layer_reports(encoder.by_name, encoder.order), *model.layers),
        notes=(
            *model.notes,
            *encoder.cover.notes,
            *encoder.cut_notes,
            *elementwise_notes(encoder.steps),
        ),
    )
