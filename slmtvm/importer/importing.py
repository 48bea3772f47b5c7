"""The import as a whole: file, frozen graph, steps, canonical model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tvm

from slmtvm.errors import UnsupportedOpError
from slmtvm.importer.cover import Cover
from slmtvm.importer.emit import Emitter, schedule
from slmtvm.importer.encoder_decoder import (
    check_uses,
    common_source,
    encoder_file,
    has_both,
    join,
    needs_encoder,
    remember_all,
    split,
    with_stand_ins,
)
from slmtvm.importer.graph import Graph
from slmtvm.importer.halves import widen
from slmtvm.importer.lengths import freeze_twice
from slmtvm.importer.load import load
from slmtvm.importer.match.cross import Source
from slmtvm.importer.outputs import choose_output
from slmtvm.importer.padding import assume_no_padding, padding_notes
from slmtvm.importer.report import elementwise_notes, family_of, hidden_size, layer_reports
from slmtvm.importer.roles import assign_roles
from slmtvm.importer.split import split_packed
from slmtvm.importer.steps import Attention, Embedding, Rows, Step
from slmtvm.ir.model import CanonicalModel, KvSpec

_MAX_SOURCE = 512  # tokens of an encoder-decoder's source


def import_onnx(path: str | Path, *, context: int | None = None) -> CanonicalModel:
    """The canonical model of an ONNX file, whatever exporter wrote it.

    ``context``: positions to compile for; by default the length of the model's own position
    tables, at most 4096, or 1024 where it has none. A decoder's file that reads the hidden states
    of an encoder is imported with the encoder's file, which lies beside it.

    Raises InvalidModelError for a file that is damaged or contradicts itself, UnsupportedOpError
    for one that holds something that cannot be compiled, each naming the file and the node.
    """
    path = Path(path)
    graph = widen(load(path))
    if needs_encoder(graph):
        graph = join(widen(load(encoder_file(path))), graph)
    if has_both(graph):
        return _import_both(graph, context)
    roles = assign_roles(graph)
    graph, padding = assume_no_padding(graph, roles.tokens.name)
    frame = freeze_twice(graph, roles, context)
    output, notes = choose_output(frame)
    cover = Cover(frame, roles.tokens.name)
    rows = cover.run(output)
    model = _canonical(_Recognised(cover, rows), output, Emitter(str(path)))
    return replace(model, padding=padding, notes=(*padding_notes(padding), *notes, *model.notes))


def _import_both(graph: Graph, context: int | None) -> CanonicalModel:
    """An encoder and a decoder: the decoder's model, and the function that reads its source."""
    halves = split(graph)
    roles = assign_roles(halves.encoder)
    frame = freeze_twice(halves.encoder, roles, None, most=_MAX_SOURCE)
    late, stand_ins = with_stand_ins(halves, frame.small)
    source = Source(Cover(frame, roles.tokens.name), stand_ins)
    late_roles = assign_roles(late)
    late_frame = freeze_twice(late, late_roles, context)
    check_uses(late_frame, stand_ins)
    output, notes = choose_output(late_frame)
    cover = Cover(late_frame, late_roles.tokens.name, encoder=source)
    rows = cover.run(output)
    last = remember_all(source, source.cover.run(common_source(frame, source.used)))
    source.cover.find(last)
    emitter = Emitter(str(graph.path))
    model = _canonical(_Recognised(cover, rows), output, emitter)
    model = _with_source(model, _Recognised(source.cover, last), emitter)
    return replace(model, notes=(*notes, *model.notes))


class _Recognised:
    """The steps of one function, and which of them its parts are."""

    def __init__(self, cover: Cover, rows: Rows) -> None:
        self.cover, self.rows = cover, rows
        self.by_name = split_packed(cover.steps)
        self.order = schedule(self.by_name, rows)
        self.steps: Sequence[Step] = [self.by_name[name] for name in self.order]
        self.attentions = [s for s in self.steps if isinstance(s, Attention)]
        embeddings = [s for s in self.steps if isinstance(s, Embedding)]
        masks = {a.mask for a in self.attentions}
        if len(embeddings) != 1 or not self.attentions or len(masks) != 1:
            raise UnsupportedOpError(
                f"{len(embeddings)} token embeddings and {len(self.attentions)} attentions with "
                f"masks {sorted(masks)}; a model with one embedding and one kind of attention is "
                "supported",
                where=str(cover.frame.graph.path),
            )
        self.embedding = embeddings[0]
        (self.mask,) = masks


def _canonical(found: _Recognised, output: str, emitter: Emitter) -> CanonicalModel:
    frame = found.cover.frame
    path, vocab = frame.graph.path, found.embedding.vocab
    kind = "decoder" if found.mask == "causal" else "encoder"
    width = frame.features(output)
    if kind == "decoder" and width != vocab:
        raise UnsupportedOpError(
            f"output {output!r} of a decoder has {width} features for each token where the "
            f"vocabulary has {vocab}; only logits of the vocabulary are supported",
            where=str(path),
        )
    main = emitter.function("main", found.by_name, found.rows)
    return CanonicalModel(
        module=tvm.IRModule({"main": main}),
        params=emitter.params,
        kind=kind,
        family=family_of(found.steps),
        context=frame.full.length,
        vocab_size=vocab,
        hidden_size=width if kind == "encoder" else hidden_size(found.steps),
        num_heads=found.attentions[0].num_heads,
        kv=tuple(KvSpec(a.num_kv_heads, a.head_dim) for a in found.attentions),
        source=path,
        output=output,
        layers=tuple(layer_reports(found.by_name, found.order)),
        notes=(*found.cover.notes, *elementwise_notes(found.steps)),
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
        notes=(*model.notes, *encoder.cover.notes, *elementwise_notes(encoder.steps)),
    )
