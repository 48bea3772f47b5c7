"""The canonical model: what the importer hands to the passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm

from slmtvm.schedules.linear.shape import BYTE_INTEGERS, GROUP_SIZES

MASKS = ("none", "arbitrary")  # what may be asked for


@dataclass(frozen=True)
class KvSpec:
    """The cache of one attention layer: num_kv_heads * head_dim keys and values a position.

    ``sight``: how many positions a row sees at most, its own included; 0 where all before it are.
    ``whole``: features of the file's heads, where ``head_dim`` projections of them are kept; else
    0.
    """

    num_kv_heads: int
    head_dim: int
    sight: int = 0
    whole: int = 0


@dataclass(frozen=True)
class Output:
    """An output of a model: ``features`` numbers for each token, or where it is ``pooled`` for the
    whole sequence; of a decoder, after its last token."""

    name: str
    features: int
    pooled: bool = False


@dataclass(frozen=True)
class LayerReport:
    """One weight-bearing layer, as ``slmtvm inspect`` prints it."""

    name: str
    kind: str  # "embedding", "linear", "norm"
    shape: tuple[int, ...]  # (out features, in features), or (vocab, dim)
    format: str  # "f32", "f16", "int8", "int4", ...
    group_size: int
    weight_bytes: int  # as the file holds it, scales and zero points included
    activation: str = ""  # what the file asks of a linear layer's input: see ``ir.ops.linear``,
    # or "static" where it is rounded with a constant scale
    group_channels: int = 0  # output channels that share a scale for each input, if several do
    sparsity: str = ""  # the pattern of zeros: "2:4", "8x4", ...; see ``importer.emit.sparsity``
    zeros: float = 0.0  # their share, where there is a pattern
    blocks_used: Mapping[str, float] = field(default_factory=dict)  # share by size, e.g. "8x4"
    windows: tuple[str, ...] = ()  # those that hold its weights, e.g. "4of8"


@dataclass(frozen=True)
class Structure:
    """Inputs of a layer that can go together with what makes them: ``kind`` "heads" or "channels".

    ``reader``: the weight of the layer that reads them; ``unit`` of its inputs, one after the
    other, go together: a channel, or the query heads that share a key head. ``makers``: of each
    layer that makes them, so that they are 0 where its outputs are: the name of its weight, its
    output that begins them, how many of its outputs make a unit, and the name of its bias or "".
    """

    kind: str
    reader: str
    unit: int
    makers: tuple[tuple[str, int, int, str], ...]


@dataclass(frozen=True)
class Exit:
    """Where a decoded token may end: after ``layer`` of the attention layers, when the first of its
    logits is ahead of the second by ``margin`` or more. ``name``: of the output that it gives, or
    "" where the model's own head makes it."""

    layer: int
    name: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class CanonicalModel:
    """One Relax function ``main(tokens, *params) -> (m, features)`` and its parameters' values.

    ``main`` takes tokens int32 (m,), m symbolic, then one variable for each key of ``params``, in
    that order and of that name. It returns what ``outputs`` says, as a tuple where these are
    several: (m, features), an encoder's pooled ones (1, features); those of a decoder have a row
    after each token. An encoder-decoder's ``main`` is its decoder; its encoder is a function
    ``source`` of the same form, which returns hidden states and remembers what the decoder's
    cross-attention reads. Where a decoder has ``exits``, there are the functions of
    ``passes.exits``.

    Of some tokens of a sequence may be said that they are hidden; of an encoder-decoder, tokens of
    its source. With ``mask`` "keys" a hidden token's key has no weight in attentions with mask
    "bidirectional" or "causal" and in cross-attentions, and its position counts. With "skip" a
    sequence gives at visible tokens what it gives without its hidden ones.
    """

    module: tvm.IRModule
    params: Mapping[str, np.ndarray]
    kind: str  # "decoder", "encoder" or "encoder-decoder"
    family: str  # what the graph looks like: "llama", "bert", ...
    context: int  # tokens; tables indexed by position have this many rows
    vocab_size: int
    hidden_size: int  # features of the rows between layers
    num_heads: int
    kv: tuple[KvSpec, ...]  # one per attention layer, in order of its ``layer`` attribute
    source: Path
    source_context: int = 0  # tokens of an encoder-decoder's source
    exact_from: int = 1  # tokens: for a shorter sequence the file computes something else
    outputs: tuple[Output, ...] = ()  # of the file, that ``main`` computes, in order
    left_out: Mapping[str, str] = field(default_factory=dict)  # the file's others, and why
    mask: str = "none"  # what hidden tokens do: "none" (there are none), "keys" or "skip"
    segments: int = 0  # token types that an encoder tells apart; 0 where it takes none
    padding: tuple[int, ...] = ()  # tokens that the file leaves out when it counts positions
    final_token: int | None = None  # with which every sequence must end: its row is the last one's
    exits: tuple[Exit, ...] = ()  # of a decoder, in order
    layers: tuple[LayerReport, ...] = field(default=())
    structures: tuple[Structure, ...] = field(default=())  # as the file has them, nothing cut out
    notes: tuple[str, ...] = field(default=())  # what was ignored or not recognised, and its cost

    @property
    def float_activation_layers(self) -> int:
        """Layers whose activations the file leaves in float32, but may be rounded: those of integer
        weights of up to 8 bits."""
        asking = [la for la in self.layers if la.activation == "f32" and not la.group_channels]
        sizes = (0, *GROUP_SIZES)
        return sum(la.format in BYTE_INTEGERS and la.group_size in sizes for la in asking)
