"""The canonical model before it is Relax: one small record for each op, rows named by strings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from slmtvm.importer.graph import Array
from slmtvm.ir.experts import ExpertLayer, Gate, Routing
from slmtvm.ir.params import Stack, Value, same_value
from slmtvm.schedules.linear.shape import bits_of
from slmtvm.schedules.rows import Pair


@dataclass(frozen=True, eq=False)
class Param:
    """A weight or table: what it is called and its value, views of the file where possible."""

    name: str
    value: Value

    @property
    def array(self) -> Array:
        """The value; a stack's is put together each time."""
        return self.value.assembled() if isinstance(self.value, Stack) else self.value

    @property
    def pieces(self) -> list[Array]:
        """The arrays that the value is of."""
        return self.value.pieces if isinstance(self.value, Stack) else [self.value]


@dataclass(frozen=True, eq=False)
class Step:
    """Base of all steps; a field that is a string names the rows that the step reads."""

    @property
    def inputs(self) -> list[Rows]:
        """The rows that this step reads, in order."""
        found: list[Rows] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Rows):
                found.append(value)
            elif isinstance(value, tuple):
                found.extend(v for v in value if isinstance(v, Rows))
        return found


def same_step(a: Step, b: Step) -> bool:
    """Whether both compute the same."""
    return _same(a, b)


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Param) and isinstance(b, Param):
        return same_value(a.value, b.value)
    if isinstance(a, (Step, Weights, ExpertWeights)):
        # What stands in for weights on probes is no part of what is computed.
        names = (f.name for f in fields(a) if f.name != "stand_in")
        return all(_same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    return repr(a) == repr(b)  # tells -0.0 from 0.0


class Rows(str):
    """The name of a (m, features) value."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Weights:
    """A weight in one of the canonical formats; see ``ir.ops.linear`` and ``ir.ops.embedding``."""

    format: str
    weight: Param
    scales: Param | None = None
    zero_points: Param | None = None
    group_size: int = 0
    group_channels: int = 0

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return bits_of(self.format)

    @property
    def default_zero(self) -> int:
        """The zero point of integer weights that have none of their own."""
        return 0 if self.bits >= 8 else 1 << (self.bits - 1)


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One linear layer of every expert: weights with a first axis of experts.

    ``stand_in`` (experts, n, a few) says what recognisers take for the weights on probes: the
    graph's products and the layer agree on it, and weights that are large are not read for that.
    None where the graph's are computed with the weights themselves.
    """

    weights: Weights
    bias: Param | None  # (experts, n)
    n: int
    k: int
    activation: str = "f32"
    stand_in: Array | None = None

    @property
    def layer(self) -> ExpertLayer:
        weights = self.weights
        return ExpertLayer(
            self.n, self.k, weights.format, self.activation, weights.group_size,
            weights.group_channels,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Embedding(Step):
    """Rows of a table by what ``by`` says: each token, its "segment", or the token "earlier", which
    is ``first`` before the first one, see ``ir.ops.earlier``."""

    table: Weights
    vocab: int
    dim: int
    by: str = "token"
    first: int = 0


@dataclass(frozen=True, eq=False)
class Linear(Step):
    x: Rows
    weights: Weights
    bias: Param | None
    n: int
    k: int
    activation: str


@dataclass(frozen=True, eq=False)
class Norm(Step):
    """An RMS norm, or with ``beta`` a layer norm."""

    x: Rows
    gamma: Param
    beta: Param | None
    eps: float
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Rope(Step):
    x: Rows
    cos: Param
    sin: Param
    num_heads: int
    head_dim: int
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Attention(Step):
    q: Rows
    k: Rows
    v: Rows
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    mask: str
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    bias: Param | None = None
    bias_by: str = "distance"
    sinks: Param | None = None
    visible: Param | None = None
    roundings: str = ""  # these three as ``ir.ops.attention`` has them
    sum_roundings: str = ""
    weight_roundings: str = ""


@dataclass(frozen=True, eq=False)
class Remember(Step):
    """``x`` itself; keys and values of a source are kept for the cross-attention of this key."""

    x: Rows
    k: Rows
    v: Rows
    key: str
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class CrossAttention(Step):
    q: Rows
    key: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    roundings: str = ""
    weight_roundings: str = ""


@dataclass(frozen=True, eq=False)
class Experts(Step):
    """A mixture of experts, see ``ir.experts.moe``; weights are stacked."""

    x: Rows
    logits: Rows
    routing: Routing
    gate: Gate
    up: ExpertWeights
    down: ExpertWeights
    selection_bias: Param | None = None
    roundings: Mapping[str, Param] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """Each channel's own causal convolution; weight (taps, channels)."""

    x: Rows
    weight: Param
    bias: Param | None


@dataclass(frozen=True, eq=False)
class PositionRows(Step):
    table: Param


@dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """A standard Relax op on rows, feature vectors and numbers."""

    op: str
    operands: tuple[Rows | Param | float, ...]


@dataclass(frozen=True, eq=False)
class QuantizeDequantize(Step):
    """``x`` rounded with a constant scale; see ``ir.ops.quantize_dequantize``."""

    x: Rows
    scale: float
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class IntegerPair(Step):
    """The sum or product of two rounded values; see ``ir.ops.integer_pair``."""

    x: Rows
    y: Rows | Param
    pair: Pair


@dataclass(frozen=True, eq=False)
class Rescale(Step):
    """``x`` in multiples of another step; see ``ir.ops.rescale``."""

    x: Rows
    steps: Param
    unit: float


@dataclass(frozen=True, eq=False)
class Reduce(Step):
    """One number for each row of ``x``: its "mean", "sum", "max" or "min"."""

    op: str
    x: Rows


@dataclass(frozen=True, eq=False)
class Concat(Step):
    """The features of all ``parts``, one after the other."""

    parts: tuple[Rows, ...]


@dataclass(frozen=True, eq=False)
class Columns(Step):
    """Features ``begin`` to ``end`` of ``x``."""

    x: Rows
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Reordered(Step):
    """Features of ``x`` in the order of ``features`` int32 (n,)."""

    x: Rows
    features: Param


@dataclass(frozen=True, eq=False)
class Pool(Step):
    """One row of all rows of ``x``, visible ones; see ``ir.ops.pool``."""

    x: Rows
    how: str


@dataclass(frozen=True, eq=False)
class Same(Step):
    """``x`` itself."""

    x: Rows


def resolve(steps: Mapping[str, Step], rows: str) -> str:
    """``rows``, seen through steps that change nothing."""
    while isinstance(step := steps.get(rows), Same):
        rows = step.x
    return rows
