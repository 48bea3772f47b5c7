"""The shapes of an attention layer's kernels, and the layout of its cache.

Keys are stored [num_kv_heads][capacity / 16][head_dim][16]: 16 positions side by side, so that a
query meets 16 keys in the lanes of one vector. Values are stored
[num_kv_heads][capacity][head_dim]: the lanes of a vector are features of one position. In int8
each key and each value of a head has a scale of its own, [num_kv_heads][capacity].

In int4 each ``scale_group`` features of a key or value have one, and two features share a byte, the
first of them in its low bits, 8 more than the number. Keys have bytes of neighbours,
[num_kv_heads][capacity / 16][head_dim / 2][16], their scales lie [num_kv_heads][groups][capacity].
Values have the halves of each vector of a head in one, [num_kv_heads][capacity][head_dim / 2],
their scales lie [num_kv_heads][capacity][groups].

A layer that never looks back beyond a window keeps a ring in their place: position p lies where
p % ring does, and overwrites what no later row sees.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from slmtvm.schedules.attention.block_mask import BlockMask
from slmtvm.schedules.kernel import Tensor, Work
from slmtvm.schedules.vector import LANES

MASKS = ("causal", "bidirectional")
KV_DTYPES = ("float32", "float16", "int8", "int4")
_SCALE_GROUP = (
    32  # features of a key or value that share a scale in int4, where these are whole groups
)
HIDDEN_SCORE = -1e30  # of a hidden key: finite, for rows that see no other
# Rows of a block share the blocks of positions that they look at.
BIAS_MARGIN = 2 * LANES


def capacity_of(positions: int) -> int:
    """Positions of a cache that holds so many: whole blocks of 16."""
    return -(-positions // LANES) * LANES


def ring_of(window: int, rows: int, capacity: int) -> int:
    """Positions of a ring for a layer that sees ``window`` positions, its own included, in steps of
    at most ``rows``; 0 where the ``capacity`` of a whole cache is not more.

    A step writes all its rows, padding too, before the first of them looks back. A block of 16 more
    lets steps look at whole blocks, and ``seek`` go back by as many positions at least.
    """
    ring = capacity_of(window - 1 + rows) + LANES
    return ring if 0 < ring < capacity else 0


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer on m tokens.

    "causal": row i is at position + i, is appended to the cache and sees positions
    0 .. position + i. "bidirectional": row i is at i, keys and values are outputs of the append
    kernel (capacity is m rounded up to 16), and every row sees positions 0 .. valid - 1. A
    "causal" layer that is ``stateless`` has its keys and values as a bidirectional one, of a step
    that is the whole sequence: its position is 0.

    The first ``rotary_dim`` (0: none) features of each query and key head are rotated by the tables
    cos and sin, float32 (table_rows, rotary_dim / 2), as ``slm.rope`` has it; there must be a row
    for every position that a step writes, padding included.

    ``accumulators``: vectors of 16 that sums are kept in, more only where there are more queries.
    ``queries``: how many share what is loaded of a key or value at most. ``apart``: whether loops
    over values keep nothing in registers of what was before them, see ``order.set_apart``.
    ``ahead``: whether keys are prefetched. ``rows_ahead``: whether the next rows' queries are, and
    where outputs go. None of these changes a result; ``tile.suited`` has what suits an ISA.

    The projections come as one tensor of rows [q heads | k heads | v heads], or as three where
    ``separate``. Where ``q_eps`` (``k_eps``) is given, each query (key) head is first divided by
    ``sqrt(mean(x**2) + eps)`` and multiplied by q_gamma (k_gamma), float32 (head_dim,).

    Where there is a ``whole``, the projections have heads of so many features: those of queries and
    keys, normed and rotated, and of values are multiplied by q_basis, k_basis and v_basis, float32
    (num_kv_heads, whole, head_dim), the matrix of their kv head.

    ``window``, ``chunk``, ``softcap`` and a bias are those of ``slm.attention``. A bias by distance
    is float32 (num_heads, bias_columns), that of distance 0 in column ``bias_zero``; for every
    pair of positions that a block of the kernel meets, visible or not, there must be a column:
    ``BIAS_MARGIN`` columns more than pairs of visible positions have. Where it is
    ``bias_by_key``, column j is for key j, and there is one for every position of the capacity.

    ``roundings``, ``sum_roundings`` and ``weight_roundings`` are what ``slm.attention`` does to
    scores before their scale and after a cap and a bias, and to the softmax's result, see
    ``ir.ops.attention``. Kernels depend on how many there are: they read their ``numbers``.

    Where there are ``mask_positions``, the score of a key is at most its limit, float32
    (mask_positions,): infinity for a visible one, ``HIDDEN_SCORE`` for a hidden one.

    Where the layer ``has_sinks``, the softmax of a head counts one score more, of no key: its
    number of ``sinks``, float32 (num_heads,).

    ``blocks``: the mask is a list of blocks of keys, see ``block_mask``.

    ``ring``, where it is not 0, is how many positions the cache keeps of ``capacity``, see
    ``ring_of``: there is a window or a chunk, and what lies before it is not kept.

    ``kv_dtype`` is how the cache holds keys and values, "float32", "float16", "int8" or "int4"
    (rounded half to even to multiples of a scale, amax / 127 in int8; in int4 the element of the
    largest magnitude is level -8 of -8 to 7); arithmetic is on float32. ``native_f16`` says whether
    the ISA converts between the first two; the values are the same.

    ``padded``: rows from the step's ``valid`` on are padding; blocks of nothing else become 0.

    ``divided``: for one token, every kv head's work is divided among as many blocks as can be; it
    changes no result.
    """

    m: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    scale: float
    mask: str = "causal"
    rotary_dim: int = 0
    interleaved: bool = False
    table_rows: int = 0
    kv_dtype: str = "float32"
    native_f16: bool = True
    accumulators: int = 4
    queries: int = 4
    apart: bool = False
    ahead: bool = False
    rows_ahead: bool = False
    separate: bool = False
    q_eps: float | None = None
    k_eps: float | None = None
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    bias_columns: int = 0
    bias_zero: int = 0
    bias_by_key: bool = False
    roundings: tuple[tuple[float, float, int, int], ...] = ()
    sum_roundings: tuple[tuple[float, float, int, int], ...] = ()
    weight_roundings: tuple[tuple[float, float, int, int], ...] = ()
    mask_positions: int = 0  # 0: all keys are visible
    stateless: bool = False
    ring: int = 0
    has_sinks: bool = False
    blocks: BlockMask | None = None
    divided: bool = False
    padded: bool = False
    whole: int = 0

    def __post_init__(self) -> None:
        assert self.mask in MASKS, self.mask
        assert self.m > 0 and self.num_heads % self.num_kv_heads == 0, self
        assert self.capacity % LANES == 0 and self.capacity >= self.m, self
        assert self.scale > 0, self
        assert self.rotary_dim % 2 == 0 and self.rotary_dim <= self.given_dim, self
        assert (self.table_rows > 0) == (self.rotary_dim > 0), self
        assert self.kv_dtype in KV_DTYPES, self.kv_dtype
        assert self.kv_dtype != "int4" or self.head_dim % 2 == 0, self
        assert not self.sum_roundings or self.bias_columns or self.softcap, self
        assert not self.bias_by_key or self.bias_columns >= self.capacity, self
        assert self.window >= 0 and self.softcap >= 0 and self.chunk >= 0, self
        assert self.causal or not (self.window or self.stateless), self
        assert not (self.chunk and self.window), self
        assert self.ring % LANES == 0 and self.ring < self.capacity, self
        assert self.blocks is None or not (self.window or self.chunk), self
        assert not self.ring or (self.cached and 0 < self.sight + self.m <= self.ring + 1), self
        assert not self.mask_positions or self.mask_positions >= self.capacity, self

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def given_dim(self) -> int:
        """Features of a head of the projections."""
        return self.whole or self.head_dim

    @property
    def causal(self) -> bool:
        """Whether rows see only what is before them."""
        return self.mask == "causal"

    @property
    def cached(self) -> bool:
        """Whether keys and values of earlier steps lie in a cache."""
        return self.causal and not self.stateless

    @property
    def sight(self) -> int:
        """Positions that a row sees at most, its own included; 0 where all before it are."""
        return self.window or self.chunk

    @property
    def scored(self) -> int:
        """Positions that the memory for scores has room for."""
        return self.blocks.most * LANES if self.blocks is not None else self.kept

    @property
    def kept(self) -> int:
        """Positions that the cache keeps."""
        return self.ring or self.capacity

    @property
    def stored_dtype(self) -> str:
        """The dtype of the cache's tensors."""
        return "uint8" if self.kv_dtype == "int4" else self.kv_dtype

    @property
    def scale_groups(self) -> int:
        """Scales of a key or value; 0 where it has none."""
        if self.kv_dtype == "int8":
            return 1
        if self.kv_dtype != "int4":
            return 0
        return 1 if self.head_dim % _SCALE_GROUP else self.head_dim // _SCALE_GROUP

    @property
    def scale_group(self) -> int:
        """Features that share a scale, where there are scales."""
        return self.head_dim // self.scale_groups

    @property
    def scalars(self) -> tuple[str, ...]:
        """The ambient scalars that attending depends on: first where its rows are, or how many keys
        they all see."""
        if not self.causal:
            return ("valid",)
        return ("position", "valid") if self.padded else ("position",)

    @property
    def projections(self) -> tuple[Tensor, ...]:
        """What the layer's linear layers computed."""
        q, kv = self.num_heads * self.given_dim, self.num_kv_heads * self.given_dim
        if not self.separate:
            return (Tensor("qkv", (self.m, q + 2 * kv), "float32"),)
        widths = {"q_in": q, "k_in": kv, "v_in": kv}
        return tuple(Tensor(name, (self.m, width), "float32") for name, width in widths.items())

    @property
    def gammas(self) -> tuple[Tensor, ...]:
        """Factors of the norms of query and key heads, where they are normed."""
        eps = {"q_gamma": self.q_eps, "k_gamma": self.k_eps}
        return tuple(
            Tensor(n, (self.given_dim,), "float32") for n, e in eps.items() if e is not None
        )

    @property
    def bases(self) -> tuple[Tensor, ...]:
        """The matrices that heads are multiplied by, where they are."""
        if not self.whole:
            return ()
        size = (self.num_kv_heads, self.whole, self.head_dim)
        return tuple(Tensor(f"{kind}_basis", size, "float32") for kind in "qkv")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What appending reads, in order."""
        return (*self.projections, *self.tables, *self.gammas, *self.bases)

    @property
    def bias(self) -> tuple[Tensor, ...]:
        """What is added to scores, where something is."""
        if not self.bias_columns:
            return ()
        return (Tensor("bias", (self.num_heads, self.bias_columns), "float32"),)

    @property
    def sinks(self) -> tuple[Tensor, ...]:
        """The score of no key that each head's softmax counts, where it does."""
        return (Tensor("sinks", (self.num_heads,), "float32"),) if self.has_sinks else ()

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """The tables of a mask that is a list of blocks."""
        return self.blocks.tensors if self.blocks is not None else ()

    @property
    def limits(self) -> tuple[Tensor, ...]:
        """The most that keys' scores may be, where some keys may be hidden."""
        if not self.mask_positions:
            return ()
        return (Tensor("limits", (self.mask_positions,), "float32"),)

    @property
    def numbers(self) -> dict[str, float]:
        """What the input ``numbers`` of kernels holds, in order."""
        groups = (self.roundings, self.sum_roundings, self.weight_roundings)
        names = ("factor", "scale", "low", "high")
        return {
            f"{name} of {i}": value
            for i, rounding in enumerate(itertools.chain(*groups))
            for name, value in zip(names, rounding, strict=True)
        }

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """That input, where something is rounded."""
        return (Tensor("numbers", (len(self.numbers),), "float32"),) if self.numbers else ()

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """cos and sin, where there is a rotation."""
        if not self.rotary_dim:
            return ()
        shape = (self.table_rows, self.rotary_dim // 2)
        return (Tensor("cos", shape, "float32"), Tensor("sin", shape, "float32"))

    @property
    def cache(self) -> tuple[Tensor, ...]:
        """The keys and the values, and their scales where they have any."""
        h, d, c = self.num_kv_heads, self.head_dim, self.kept
        groups, width = self.scale_groups, d // 2 if self.kv_dtype == "int4" else d
        stored = (
            Tensor("k_cache", (h, c // LANES, width, LANES), self.stored_dtype),
            Tensor("v_cache", (h, c, width), self.stored_dtype),
        )
        if not groups:
            return stored
        k, v = ((h, c), (h, c)) if self.kv_dtype == "int8" else ((h, groups, c), (h, c, groups))
        return (*stored, Tensor("k_scale", k, "float32"), Tensor("v_scale", v, "float32"))

    @property
    def q(self) -> Tensor:
        """The rotated queries."""
        return Tensor("q", (self.m, self.num_heads * self.head_dim), "float32")

    @property
    def o(self) -> Tensor:
        """The result."""
        return Tensor("o", (self.m, self.num_heads * self.head_dim), "float32")

    @property
    def table_bytes(self) -> dict[str, int]:
        """What a step of m rows reads of each table."""
        return {t.name: self.m * self.rotary_dim // 2 * 4 for t in self.tables}

    @property
    def work(self) -> Work:
        """What attending computes: scores and weighted values."""
        per_position = 2 * self.m * self.num_heads * self.head_dim
        if self.cached:
            return Work(
                context_multiply_adds=per_position,
                window=self.blocks.most * LANES if self.blocks else self.sight,
                positions=self.kept,
                touched=self.table_bytes,
            )
        return Work(multiply_adds=per_position * self.m)

    def name(self, kind: str) -> str:
        """A name that says all that the code of the kernel ``kind`` depends on."""
        parts = [
            f"attention_{kind}_{self.mask}_m{self.m}",
            f"h{self.num_heads}x{self.num_kv_heads}x{self.head_dim}",
            f"c{self.capacity}",
        ]
        if self.ring:
            parts.append(f"ring{self.ring}")
        if self.kv_dtype == "float16":
            parts.append("f16" if self.native_f16 else "f16int")
        if self.kv_dtype in ("int8", "int4"):
            parts.append(self.kv_dtype)
        if self.divided:
            parts.append("divided")
        if kind != "attend":
            parts += self._append_parts()
        if kind != "append":
            parts += self._attend_parts()
        return "_".join(parts)

    def _append_parts(self) -> list[str]:
        parts = ["stateless"] if self.stateless else []
        if self.rotary_dim:
            order = "interleaved" if self.interleaved else "halves"
            parts.append(f"r{self.rotary_dim}{order}{self.table_rows}")
        if self.whole:
            parts.append(f"of{self.whole}")
        if self.separate:
            parts.append("separate")
        for name, eps in (("q", self.q_eps), ("k", self.k_eps)):
            if eps is not None:
                parts.append(f"{name}norm{_hex(eps)}")
        return parts

    def _attend_parts(self) -> list[str]:
        parts = [f"s{_hex(self.scale)}", f"a{self.accumulators}q{self.queries}"]
        if self.apart:
            parts.append("apart")
        if self.ahead:
            parts.append("ahead")
        if self.rows_ahead:
            parts.append("rowsahead")
        if self.window:
            parts.append(f"w{self.window}")
        if self.chunk:
            parts.append(f"b{self.chunk}")
        if self.softcap:
            parts.append(f"cap{_hex(self.softcap)}")
        for kind, roundings in (
            ("f", self.roundings), ("t", self.sum_roundings), ("p", self.weight_roundings),
        ):  # fmt: skip
            if roundings:
                parts.append(f"{kind}{len(roundings)}")
        if self.bias_columns:
            of = "bykey" if self.bias_by_key else f"at{self.bias_zero}"
            parts.append(f"bias{self.bias_columns}{of}")
        if self.has_sinks:
            parts.append("sinks")
        if self.blocks is not None:
            parts.append(self.blocks.name())
        if self.mask_positions:
            parts.append(f"mask{self.mask_positions}")
        if self.padded:
            parts.append("valid")
        return parts


def _hex(value: float) -> str:
    """A float32 as part of a name."""
    return struct.pack(">f", value).hex()
