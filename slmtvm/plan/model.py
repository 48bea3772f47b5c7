"""The static plan: which kernel runs when, on which bytes. Codegen reads nothing else.

A plan holds a few functions (``body`` for each chunk size, ``head``), each a straight list of
kernel calls. Every byte that a call touches lies in one of the spaces below, at an offset fixed
here, so the device allocates nothing after loading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from tvm import tirx

from slmtvm.plan.setup import PARALLEL_BYTES
from slmtvm.schedules.kernel import Tunable

_FLOAT_BYTES = 4


class Space(IntEnum):
    """Where an argument lies; the values are the C runtime's."""

    WEIGHTS = 0  # the mapped weights file, read only, shared by all sessions
    STATE = 1  # KV cache, one for each session
    ARENA = 2  # activations, one for each session, reused between calls
    SCRATCH = 3  # one piece for each thread: base + thread * scratch_bytes
    TOKENS = 4  # int32 token ids of the step
    OUTPUT = 5  # float32: the outputs of the step, one behind the other


@dataclass(frozen=True)
class Ref:
    """``size`` bytes at ``offset`` of a space; offsets are multiples of 64 bytes."""

    space: Space
    offset: int
    size: int


@dataclass(frozen=True)
class Step:
    """One kernel call: ``kernel(*args, [position], [valid], begin, end)`` over blocks 0..grid.

    ``by_session``, in a function whose rows are of different sessions: a call for each row, with
    STATE, position and valid of that row's session. Arguments in ARENA then hold as many parts as
    there are rows, one after the other; the ``outputs`` ones before SCRATCH are written.
    """

    kernel: str
    args: tuple[Ref, ...]
    grid: int
    by_session: bool = False
    outputs: int = 0


@dataclass(frozen=True)
class Function:
    """``body`` turns ``rows`` tokens into hidden rows in the arena (an encoder's writes OUTPUT);
    ``head`` turns ``rows`` consecutive hidden rows, the first at Plan.hidden plus the row's offset,
    into logits in OUTPUT; ``batch`` and ``batchhead`` do the same with rows that are tokens of
    different sessions; ``stem0``, ``exithead0`` and ``fill0`` are those of ``passes.exits``, of one
    token, and leave rows where ``body`` and ``head`` do; ``source`` turns the ``rows`` tokens of an
    encoder-decoder's source into keys and values in STATE and hidden rows in OUTPUT."""

    name: str  # "body", "head", "batch", "batchhead", "source", or one of an exit's
    rows: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class KernelWork:
    """Bytes read and multiply-adds of one call of a kernel, for the bench.

    ``context_bytes`` are those of the KV cache for each position that is attended to;
    ``context_multiply_adds`` those for each position that every row of the call attends to; there
    are at most ``window`` of these, unless that is 0.
    """

    weight_bytes: int = 0
    activation_bytes: int = 0  # written ones too
    multiply_adds: int = 0
    context_bytes: int = 0
    context_multiply_adds: int = 0
    window: int = 0


@dataclass(frozen=True)
class KernelCode:
    """A kernel as the code generator needs it.

    ``func`` takes buffers, then the scalars of ``scalars`` (int32, a subset of "position" and
    "valid", in that order), then int32 ``begin`` and ``end``.
    """

    func: tirx.PrimFunc
    buffers: int
    scalars: tuple[str, ...]
    work: KernelWork = field(default_factory=KernelWork)
    tunable: Tunable | None = None  # what the tuner may change of it
    runs: int = 1  # see schedules.kernel.Kernel


@dataclass(frozen=True)
class Segment:
    """One packed weight at ``offset`` of the weights file."""

    name: str
    offset: int
    data: np.ndarray


@dataclass(frozen=True)
class PlanOutput:
    """An output: rows of ``features`` float32 from ``offset`` of the space OUTPUT on.

    A row for each token, or where it is ``pooled`` one for the whole sequence: the only row of an
    encoder's, the one after the last token of a decoder's.
    """

    name: str
    features: int
    pooled: bool = False
    offset: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that one target's library is made from.

    Memory of a session is ``state_bytes + arena_bytes + threads * scratch_bytes`` plus what the
    caller passes in. ``capacity`` positions fit the KV cache (at least ``context``; padded chunks
    may write past ``context`` but never past ``capacity``).
    """

    kind: str  # "decoder", "encoder" or "encoder-decoder"
    functions: tuple[Function, ...]
    kernels: dict[str, KernelCode]
    segments: tuple[Segment, ...]
    context: int
    capacity: int
    vocab_size: int
    outputs: tuple[PlanOutput, ...]
    hidden: Ref  # where body leaves its rows for head (rows of hidden_size float32)
    hidden_size: int  # features of a row that body makes
    state_bytes: int
    arena_bytes: int
    scratch_bytes: int  # for each thread
    kv_bytes_per_token: int  # of what one position has in all layers
    kv_bytes: int = 0  # of the cache: all positions, or in some layers those of a window
    ring: int = 0  # of the smallest window kept; 0 for none
    seek_reach: int = 0  # see LoweredModel
    mask: str = "none"  # what hidden tokens do, see CanonicalModel
    limits: Ref | None = None  # of keys' scores, float32 by position, where mask is "keys"
    weights_have_places: bool = False  # kernels read offsets from weights, which must be whole
    segment_types: int = 0  # that an encoder tells apart: which text a token is of
    segment_ids: Ref | None = None  # int32 by position, where there are such types
    final_token: int | None = None  # that every sequence must end with
    exits: tuple[float, ...] = ()  # the margin from which a token ends there, in order
    source_context: int = 0  # tokens of an encoder-decoder's source
    parallel_bytes: int = PARALLEL_BYTES  # of operands, from which a step is divided over threads
    threads: int = 0  # as many as pay where that is known
    info: dict[str, object] = field(default_factory=dict)  # goes into slm_info and the manifest

    @property
    def output_size(self) -> int:
        """Features of a row of the first output."""
        return self.outputs[0].features

    @property
    def output_bytes(self) -> int:
        """Bytes of the space OUTPUT."""
        encodes = self.kind == "encoder"
        last = ("body",) if encodes else ("head", "batchhead")
        rows = max(f.rows for f in self.functions if f.name in last)
        ends = [
            o.offset + _FLOAT_BYTES * o.features * (1 if encodes and o.pooled else rows)
            for o in self.outputs
        ]
        sources = [f.rows * self.hidden_size for f in self.functions if f.name == "source"]
        return max(*ends, _FLOAT_BYTES * max(sources, default=0))

    @property
    def weights_bytes(self) -> int:
        return max((s.offset + s.data.nbytes for s in self.segments), default=0)
