"""A toy decoder and a toy encoder as plans of a few small kernels, with their numpy references.

All weights are small whole numbers, so float32 sums are exact in any order: tests compare with ==.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from slmtvm.plan.model import Function, KernelCode, Plan, PlanOutput, Ref, Segment, Space, Step
from slmtvm.schedules.kernel import Kernel, Tensor, define

VOCAB = 101
HIDDEN = 84  # not a multiple of 16: hidden rows are not aligned
CONTEXT = 50
CAPACITY = 64
CHUNKS = (16, 4, 1)
HEAD_ROWS = (4, 1)
BATCH_ROWS = (4, 2)
ALIGNED = 96  # floats between the rows of different sessions
BUCKETS = (8, 32)
_FLOAT = 4  # bytes


def toy_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """table (VOCAB, HIDDEN), bias (HIDDEN,), head (VOCAB, HIDDEN): whole numbers in float32."""
    rng = np.random.default_rng(seed)

    def whole(*shape: int) -> np.ndarray:
        return rng.integers(-3, 4, shape).astype(np.float32)

    return {
        "table": whole(VOCAB, HIDDEN),
        "bias": whole(HIDDEN),
        "head": whole(VOCAB, HIDDEN),
    }


def decoder_reference(
    tokens: list[int], weights: dict[str, np.ndarray], mask: np.ndarray | None = None
) -> np.ndarray:
    """Logits (n, VOCAB): every position sees the sum of all embeddings up to its own, plus bias.

    What ``mask`` hides is not added, whether it is a key without weight or left out.
    """
    visible = np.ones((len(tokens), 1), bool) if mask is None else np.reshape(mask, (-1, 1)) != 0
    sums = np.cumsum(weights["table"][tokens] * visible, axis=0) + weights["bias"]
    return sums @ weights["head"].T * visible


def encoder_reference(
    tokens: list[int], weights: dict[str, np.ndarray], mask: np.ndarray | None = None
) -> np.ndarray:
    """Rows (n, HIDDEN): each embedding times n, minus the sum over all visible ones."""
    rows = weights["table"][tokens]
    visible = np.ones((len(tokens), 1), bool) if mask is None else np.reshape(mask, (-1, 1)) != 0
    return (rows * len(tokens) - (rows * visible).sum(axis=0) + weights["bias"]) * visible


def toy_decoder(
    weights: dict[str, np.ndarray] | None = None,
    *,
    context: int = CONTEXT,
    extra_bytes: int = 0,
    mask: str = "none",
    batches: bool = True,
) -> Plan:
    """A decoder whose cache holds embeddings; ``extra_bytes`` adds a weight that nothing reads.

    batches: whether it takes rows of several sessions.
    """
    build = _Builder(weights or toy_weights(), ("table", "bias", "head"), extra_bytes)
    row = HIDDEN * _FLOAT
    capacity = context + CAPACITY - CONTEXT
    x = Ref(Space.ARENA, 0, CHUNKS[0] * row)
    hidden = Ref(Space.ARENA, x.size + -x.size % 64, CHUNKS[0] * row)
    cache = Ref(Space.STATE, 0, capacity * row)
    limits = Ref(Space.STATE, cache.size + -cache.size % 64, capacity * 4)
    hides = mask == "keys"
    functions = []
    for rows in CHUNKS:
        tokens = Ref(Space.TOKENS, 0, rows * 4)
        mine = [Ref(r.space, r.offset, rows * row) for r in (x, hidden)]
        steps = (
            build.step(embed(rows), tokens, build.weight("table"), mine[0]),
            build.step(remember(rows, capacity), mine[0], cache),
            build.step(
                add_up(rows, capacity, hides), *([limits] if hides else []), cache,
                build.weight("bias"), mine[1], Ref(Space.SCRATCH, 0, row),
            ),
        )  # fmt: skip
        functions.append(Function("body", rows, steps))
    for rows in BATCH_ROWS if batches else ():
        mine = [Ref(r.space, r.offset, rows * ALIGNED * _FLOAT) for r in (x, hidden)]
        logits = Ref(Space.OUTPUT, 0, rows * VOCAB * _FLOAT)
        steps = (
            build.step(
                embed(rows, ALIGNED), Ref(Space.TOKENS, 0, rows * 4), build.weight("table"), mine[0]
            ),
            build.step(remember(1, capacity), mine[0], cache, by_session=True),
            build.step(
                add_up(1, capacity, hides), *([limits] if hides else []), cache,
                build.weight("bias"), mine[1], Ref(Space.SCRATCH, 0, row), by_session=True,
            ),
        )  # fmt: skip
        functions.append(Function("batch", rows, steps))
        head = build.step(project(rows, ALIGNED), mine[1], build.weight("head"), logits)
        functions.append(Function("batchhead", rows, (head,)))
    for rows in HEAD_ROWS:
        logits = Ref(Space.OUTPUT, 0, rows * VOCAB * _FLOAT)
        mine_hidden = Ref(hidden.space, hidden.offset, rows * row)
        steps = (build.step(project(rows), mine_hidden, build.weight("head"), logits),)
        functions.append(Function("head", rows, steps))
    return Plan(
        kind="decoder", functions=tuple(functions), kernels=build.kernels,
        segments=build.segments, context=context, capacity=capacity, vocab_size=VOCAB,
        outputs=(PlanOutput("logits", VOCAB),), hidden=hidden, hidden_size=HIDDEN,
        state_bytes=limits.offset + limits.size if hides else cache.size, mask=mask,
        limits=limits if hides else None,
        arena_bytes=hidden.offset + hidden.size, scratch_bytes=row + -row % 64,
        kv_bytes_per_token=row,
        info={"family": "toy", "quote": 'a "\\ trigraph ??/'},
    )  # fmt: skip


def toy_encoder(weights: dict[str, np.ndarray] | None = None, *, mask: str = "none") -> Plan:
    """An encoder in buckets of 8 and 32 tokens."""
    hides = mask == "keys"
    limits = Ref(Space.STATE, 0, max(BUCKETS) * 4)
    build = _Builder(weights or toy_weights(), ("table", "bias"))
    row = HIDDEN * _FLOAT
    functions = []
    for rows in BUCKETS:
        x = Ref(Space.ARENA, 0, rows * row)
        output = Ref(Space.OUTPUT, 0, rows * row)
        steps = (
            build.step(embed(rows), Ref(Space.TOKENS, 0, rows * 4), build.weight("table"), x),
            build.step(
                center(rows, hides), *([limits] if hides else []), x, build.weight("bias"), output
            ),
        )
        functions.append(Function("body", rows, steps))
    return Plan(
        kind="encoder", functions=tuple(functions), kernels=build.kernels,
        segments=build.segments, context=max(BUCKETS), capacity=max(BUCKETS), vocab_size=VOCAB,
        outputs=(PlanOutput("rows", HIDDEN),), hidden=Ref(Space.OUTPUT, 0, 0), hidden_size=HIDDEN,
        state_bytes=limits.size if hides else 0, mask=mask, limits=limits if hides else None,
        arena_bytes=max(BUCKETS) * row, scratch_bytes=0, kv_bytes_per_token=0,
        info={"family": "toy"},
    )  # fmt: skip


def embed(rows: int, stride: int = HIDDEN) -> Kernel:
    def body(block, tokens, table, out):  # type: ignore[no-untyped-def]
        token = T.bind(tokens[block])
        with T.serial(0, HIDDEN) as i:
            T.buffer_store(out, table[token * HIDDEN + i], [block * stride + i])

    return define(
        f"embed_{rows}_{stride}",
        [
            Tensor("tokens", (rows,), "int32"),
            Tensor("table", (VOCAB, HIDDEN), "float32"),
            Tensor("out", (rows, stride), "float32"),
        ],
        body,
        grid=rows,
        outputs=["out"],
    )


def remember(rows: int, capacity: int) -> Kernel:
    """cache[position + r] = x[r]"""

    def body(block, x, cache, position):  # type: ignore[no-untyped-def]
        with T.serial(0, HIDDEN) as i:
            T.buffer_store(cache, x[block * HIDDEN + i], [(position + block) * HIDDEN + i])

    return define(
        f"remember_{rows}_{capacity}",
        [Tensor("x", (rows, HIDDEN), "float32"), Tensor("cache", (capacity, HIDDEN), "float32")],
        body,
        grid=rows,
        outputs=[],
        state=["cache"],
        scalars=["position"],
    )


def _unless_hidden(limits: list[Any], position: Any, value: Any) -> Any:
    """``value``, or 0 where there are limits and they hide ``position``."""
    if not limits:
        return value
    return T.Select(limits[0][position] > T.float32(0), value, T.float32(0))


def _limits(positions: int, hides: bool) -> list[Tensor]:
    return [Tensor("limits", (positions,), "float32")] if hides else []


def add_up(rows: int, capacity: int, hides: bool = False) -> Kernel:
    """out[r] = bias + the sum of cache[0 .. position + r], gathered in the thread's scratch.

    Where it ``hides``, of those positions alone that limits do not hide.
    """

    def body(block, *arguments):  # type: ignore[no-untyped-def]
        *limits, cache, bias, out, scratch, position = arguments
        with T.serial(0, HIDDEN) as i:
            T.buffer_store(scratch, bias[i], [i])
        with T.serial(0, position + block + 1) as p, T.serial(0, HIDDEN) as i:
            value = _unless_hidden(limits, p, cache[p * HIDDEN + i])
            T.buffer_store(scratch, scratch[i] + value, [i])
        with T.serial(0, HIDDEN) as i:
            T.buffer_store(out, scratch[i], [block * HIDDEN + i])

    return define(
        f"add_up_{rows}_{capacity}{'_hides' if hides else ''}",
        [
            *_limits(capacity, hides),
            Tensor("cache", (capacity, HIDDEN), "float32"),
            Tensor("bias", (HIDDEN,), "float32"),
            Tensor("out", (rows, HIDDEN), "float32"),
            Tensor("scratch", (HIDDEN,), "float32"),
        ],
        body,
        grid=rows,
        outputs=["out"],
        scalars=["position"],
    )


def project(rows: int, stride: int = HIDDEN) -> Kernel:
    """out[r, v] = sum of x[r] * head[v]; a block is one v of all rows."""

    def body(block, x, head, out):  # type: ignore[no-untyped-def]
        with T.serial(0, rows) as r:
            T.buffer_store(out, T.float32(0), [r * VOCAB + block])
            with T.serial(0, HIDDEN) as i:
                product = x[r * stride + i] * head[block * HIDDEN + i]
                T.buffer_store(out, out[r * VOCAB + block] + product, [r * VOCAB + block])

    return define(
        f"project_{rows}_{stride}",
        [
            Tensor("x", (rows, stride), "float32"),
            Tensor("head", (VOCAB, HIDDEN), "float32"),
            Tensor("out", (rows, VOCAB), "float32"),
        ],
        body,
        grid=VOCAB,
        outputs=["out"],
    )


def center(rows: int, hides: bool = False) -> Kernel:
    """out[r] = x[r] * valid - the sum of x[0 .. valid) + bias; a block is one feature.

    Where it ``hides``, the sum is of what limits do not hide.
    """

    def body(block, *arguments):  # type: ignore[no-untyped-def]
        *limits, x, bias, out, valid = arguments
        with T.serial(0, rows) as r:
            product = x[r * HIDDEN + block] * T.Cast("float32", valid)
            T.buffer_store(out, product + bias[block], [r * HIDDEN + block])
            with T.serial(0, valid) as other:
                value = _unless_hidden(limits, other, x[other * HIDDEN + block])
                T.buffer_store(out, out[r * HIDDEN + block] - value, [r * HIDDEN + block])

    return define(
        f"center_{rows}{'_hides' if hides else ''}",
        [
            *_limits(max(BUCKETS), hides),
            Tensor("x", (rows, HIDDEN), "float32"),
            Tensor("bias", (HIDDEN,), "float32"),
            Tensor("out", (rows, HIDDEN), "float32"),
        ],
        body,
        grid=HIDDEN,
        outputs=["out"],
        scalars=["valid"],
    )


@dataclass(init=False)
class _Builder:
    """Lays the weights out one after the other and collects the kernels of the steps."""

    segments: tuple[Segment, ...]
    kernels: dict[str, KernelCode]

    def __init__(
        self, weights: dict[str, np.ndarray], names: tuple[str, ...], extra_bytes: int = 0
    ) -> None:
        self.kernels = {}
        chosen = [(name, weights[name]) for name in names]
        if extra_bytes:
            rng = np.random.default_rng(1)
            chosen.append(("extra", rng.integers(0, 256, extra_bytes, dtype=np.uint8)))
        segments, at = [], 0
        for name, data in chosen:
            segments.append(Segment(name, at, data))
            at += data.nbytes + -data.nbytes % 64
        self.segments = tuple(segments)

    def weight(self, name: str) -> Ref:
        segment = next(s for s in self.segments if s.name == name)
        return Ref(Space.WEIGHTS, segment.offset, segment.data.nbytes)

    def step(self, kernel: Kernel, *args: Ref, by_session: bool = False) -> Step:
        name = str(kernel.func.attrs["global_symbol"])
        self.kernels[name] = KernelCode(kernel.func, len(kernel.tensors), kernel.scalars)
        outputs = len(kernel.outputs) if by_session else 0
        return Step(name, args, kernel.grid, by_session, outputs)
