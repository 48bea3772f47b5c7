"""A graph with an encoder and a decoder, or two files that hold one each, as two functions.

What depends on the source's tokens alone is the encoder: it runs once. The decoder's graph is
frozen with numbers in the place of the values that it reads from there, which are keys and values
of its cross-attentions and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.expand import expand
from slmtvm.importer.frame.frame import Frame
from slmtvm.importer.freeze.freeze import freeze
from slmtvm.importer.freeze.frozen import Frozen
from slmtvm.importer.freeze.roles import HIDDEN_STATES, Roles, assign_roles
from slmtvm.importer.graph import Array, Constant, Graph, Node, Port, needed
from slmtvm.importer.operators import Kind
from slmtvm.importer.operators.compute import operator_of
from slmtvm.importer.recognise.attention.cross import Source
from slmtvm.importer.recognise.steps import Remember, Rows

_PAST_OF_SOURCE = re.compile(r"past.*\.encoder\..*")
_DECODER_PREFIX = "decoder_"
TOKENS_OF_BOTH = ("input_ids", f"{_DECODER_PREFIX}input_ids")
_ENCODER = "encoder/"  # prefix of the names of an encoder's file
_LENGTH = 7  # tokens at which the decoder's branches are chosen: any will do
_EXACT = 1 << 24  # float32 holds all whole numbers up to here


@dataclass(frozen=True)
class Halves:
    """The encoder's graph, whose outputs are what the decoder reads, and the decoder's."""

    encoder: Graph
    decoder: Graph


def needs_encoder(graph: Graph) -> bool:
    """Whether ``graph`` is a decoder that takes an encoder's hidden states as an input.

    Raises UnsupportedOpError where it takes the keys and values of a source instead: such a graph
    cannot begin.
    """
    if any(port.name == HIDDEN_STATES for port in graph.inputs):
        return True
    if any(_PAST_OF_SOURCE.fullmatch(port.name) for port in graph.inputs):
        raise UnsupportedOpError(
            "a decoder that takes its source's keys and values from an earlier step; compile "
            "decoder_model.onnx or decoder_model_merged.onnx of the same export",
            where=str(graph.path),
        )
    return False


def encoder_file(path: Path, given: Path | None = None) -> Path:
    """The file that holds the encoder of the decoder ``path``: the one that is given, or the one
    beside it; raises where there is none."""
    if given is not None:
        return given
    for name in dict.fromkeys(
        (f"encoder{path.name.partition('decoder')[2]}", "encoder_model.onnx")
    ):
        candidate = path.with_name(name)
        if candidate.is_file():
            return candidate
    raise InvalidModelError(
        f"this decoder reads {HIDDEN_STATES}, and there is no encoder_model.onnx beside it; name "
        "its encoder's file with --encoder",
        where=str(path),
    )


def has_both(graph: Graph) -> bool:
    """Whether ``graph`` holds an encoder and a decoder."""
    return {port.name for port in graph.inputs} >= set(TOKENS_OF_BOTH)


def join(encoder: Graph, decoder: Graph) -> Graph:
    """One graph of the two files' graphs: the decoder reads the encoder's only output.

    Composite operators are written out; where there are branches, those without a past are taken.
    """
    encoder, decoder = (expand(g, assign_roles(g), _LENGTH) for g in (encoder, decoder))
    hidden = encoder.outputs[0].name
    names = {v: f"{_ENCODER}{v}" for v in _all_names(encoder)}
    names |= {port.name: port.name for port in encoder.inputs}
    own = {port.name: f"{_DECODER_PREFIX}{port.name}" for port in decoder.inputs
           if not port.name.startswith("encoder_")}  # fmt: skip
    own |= {"encoder_attention_mask": "attention_mask", HIDDEN_STATES: names[hidden]}
    first, second = _renamed(encoder, names), _renamed(decoder, own)
    taken = {port.name for port in first.inputs} | {names[hidden]}
    read = {name for node in second.nodes for name in node.inputs} - taken
    inputs = (*first.inputs, *(port for port in second.inputs if port.name in read))
    return Graph(
        decoder.path,
        (*first.nodes, *second.nodes),
        inputs,
        second.outputs,
        {**first.initializers, **second.initializers},
    )


def written_out(graph: Graph) -> Graph:
    """``graph``, of one file with an encoder and a decoder, without composite operators."""
    source, _ = TOKENS_OF_BOTH
    decoders = replace(graph, inputs=tuple(p for p in graph.inputs if p.name != source))
    return expand(graph, assign_roles(decoders), _LENGTH, source=source)


def _all_names(graph: Graph) -> Iterable[str]:
    yield from graph.initializers
    for node in graph.nodes:
        yield from filter(None, node.outputs)


def _renamed(graph: Graph, names: dict[str, str]) -> Graph:
    def renamed(values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(v, v) for v in values)

    def port(value: Port) -> Port:
        return replace(value, name=names.get(value.name, value.name))

    return Graph(
        graph.path,
        tuple(
            replace(n, inputs=renamed(n.inputs), outputs=renamed(n.outputs)) for n in graph.nodes
        ),
        tuple(port(p) for p in graph.inputs),
        tuple(port(p) for p in graph.outputs),
        {names.get(k, k): c for k, c in graph.initializers.items()},
    )


def split(graph: Graph) -> Halves:
    """The two halves of a graph with an encoder and a decoder.

    Sizes do not count as depending: exporters take the batch of either half from whichever input.
    """
    decoders = tuple(p for p in graph.inputs if p.name.startswith((_DECODER_PREFIX, "past")))
    sources = tuple(p for p in graph.inputs if p not in decoders)
    late = _depending(graph.nodes, {p.name for p in decoders})
    # Sizes of values that the decoder computes are not to be had while the encoder runs.
    while sizes := _sizes(graph.nodes, late) - late:
        late |= sizes | _depending(graph.nodes, sizes)
    early = _depending(graph.nodes, {p.name for p in sources}) - late
    encoder = tuple(n for n in graph.nodes if not set(n.outputs) & late)
    decoder = tuple(n for n in graph.nodes if not set(n.outputs) & early)
    made = {p.name for p in sources} | early
    read = dict.fromkeys(i for n in decoder for i in n.inputs if i in made)
    outputs = tuple(Port(name, 0, None) for name in read)
    late_outputs = tuple(o for o in graph.outputs if o.name not in early)
    return Halves(
        Graph(
            graph.path,
            needed(encoder, read),
            sources,
            outputs,
            {**graph.initializers, **_one_token(decoders)},
        ),
        Graph(graph.path, decoder, decoders, late_outputs, graph.initializers),
    )


def _one_token(ports: Iterable[Port]) -> dict[str, Constant]:
    """What the encoder's graph may take a batch size from."""
    return {
        port.name: Constant.of(port.name, np.zeros([1] * len(port.dims or ()), np.int64))
        for port in ports
    }


def _sizes(nodes: Iterable[Node], values: set[str]) -> set[str]:
    """The sizes that are taken of ``values``."""
    shapes = [n for n in nodes if operator_of(n).kind is Kind.SHAPE]
    return {o for n in shapes if values.intersection(n.inputs) for o in n.outputs}


def _depending(nodes: Iterable[Node], names: set[str]) -> set[str]:
    """The outputs of nodes that depend on elements of one of ``names``."""
    found = set(names)
    for node in nodes:  # in order: what a node reads comes before it
        if operator_of(node).kind is not Kind.SHAPE and found.intersection(node.inputs):
            found.update(filter(None, node.outputs))
    return found - names


def with_stand_ins(halves: Halves, frozen: Frozen) -> tuple[Graph, dict[str, int]]:
    """The decoder's graph with constants for what it reads, and the stand-ins among them.

    What follows from the source's length alone is the constant that it is in ``frozen``, the
    encoder's graph. The elements of the others are numbered through; a stand-in is given with its
    first number.
    """
    constants = source_constants(halves, frozen)
    stand_ins: dict[str, int] = {}
    number = 1
    for name in (port.name for port in halves.encoder.outputs):
        if name in constants:
            continue
        if name in frozen.shapes:
            shape = frozen.shapes[name]
            stand_ins[name] = number
            end = number + math.prod(shape)
            constants[name] = Constant.of(name, _numbers(number, end, frozen).reshape(shape))
            number = end
        else:
            raise UnsupportedOpError(
                frozen.broken.get(name, f"{name!r} is not known"), where=str(frozen.graph.path)
            )
    initializers = {**halves.decoder.initializers, **constants}
    return replace(halves.decoder, initializers=initializers), stand_ins


def source_constants(halves: Halves, frozen: Frozen) -> dict[str, Constant]:
    """What the decoder reads of the encoder's graph that does not depend on tokens."""
    names = (port.name for port in halves.encoder.outputs)
    return {n: Constant.of(n, frozen.constants[n].values()) for n in names if n in frozen.constants}


def _numbers(begin: int, end: int, frozen: Frozen) -> Array:
    if end > _EXACT:
        raise UnsupportedOpError(
            f"a decoder that reads more than {_EXACT} numbers of {frozen.length} source tokens",
            where=str(frozen.graph.path),
        )
    return np.arange(begin, end, dtype=np.float64)  # exact also where they are scaled


def freeze_with_ones(frame: Frame, roles: Roles, stand_ins: Iterable[str]) -> Frozen:
    """``frame``'s graph, of the decoder, at the short length with ones for all ``stand_ins``."""
    given = frame.graph.initializers
    ones = {name: Constant.of(name, np.ones(given[name].shape)) for name in stand_ins}
    graph = replace(frame.graph, initializers={**given, **ones})
    return freeze(graph, roles, frame.small.length)


def check_uses(frame: Frame, stand_ins: Iterable[str]) -> None:
    """Raise where the decoder uses what it reads of the source outside of matrix products, or does
    more to it before than move it and multiply it by a number."""
    derived = _depending(frame.graph.nodes, set(stand_ins)) & frame.small.constants.keys()
    for node in frame.graph.nodes:
        if not any(output in frame.small.shapes for output in node.outputs):
            continue
        read = derived.union(stand_ins).intersection(node.inputs)
        if read and (node.op_type != "MatMul" or node.inputs[0] in read):
            raise UnsupportedOpError(
                f"reads {sorted(read)} of the source outside of a cross-attention, which is not "
                "supported",
                where=frame.graph.where(node),
            )
        _check_moved(frame, read - set(stand_ins), derived)


_MOVING = ("Cast", "Div", "Mul", "Neg")


def _check_moved(frame: Frame, values: set[str], derived: set[str]) -> None:
    """Raise where ``values`` are made of those of the source by anything else than _MOVING."""
    makers = {o: n for n in frame.graph.nodes for o in n.outputs}
    todo, seen = list(values), set(values)
    while todo:
        node = makers[todo.pop()]
        if operator_of(node).kind is not Kind.MOVE and node.op_type not in _MOVING:
            raise UnsupportedOpError(
                "changes keys or values of the source in the decoder by more than a factor, which "
                "is not supported",
                where=frame.graph.where(node),
            )
        fresh = [i for i in node.inputs if i in derived and i not in seen]
        seen.update(fresh)
        todo.extend(fresh)


def common_source(frame: Frame, values: Iterable[str]) -> str:
    """The nearest value that all of ``values`` are computed from: the encoder's hidden states."""
    frontier = {v for v in values if v in frame.small.shapes}
    while len(frontier) > 1:
        latest = max(frontier, key=lambda v: frame.order.get(v, -1))
        node = frame.producers.get(latest)
        if node is None:
            break
        frontier.discard(latest)
        frontier.update(frame.dynamic(node))
    if len(frontier) != 1:
        raise UnsupportedOpError(
            "the decoder reads nothing of its source", where=str(frame.graph.path)
        )
    return frontier.pop()


def remember_all(source: Source, hidden: Rows) -> Rows:
    """Steps that keep all keys and values; the rows after the last, which are ``hidden``'s.

    What they need of the source's graph must be found afterwards.
    """
    rows = hidden
    for key, kept in source.remembered.items():
        step = Remember(rows, kept.k, kept.v, key, kept.num_kv_heads, kept.head_dim)
        rows = source.cover.add(f"{key}#remembered", step)
    return rows
