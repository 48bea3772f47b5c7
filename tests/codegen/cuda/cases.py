"""Kernels with their inputs, and what a CPU's kernel of the same meaning computes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slmtvm.codegen.cuda.nodes import Node, single
from slmtvm.codegen.cuda.translate import translate
from slmtvm.plan.model import Ref, Space
from slmtvm.schedules import attention, embedding, linear, rows
from slmtvm.schedules import isa as isas
from slmtvm.schedules.embedding import EmbeddingOp
from slmtvm.schedules.head_linear import HeadLinearShape, build_head_linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.likeliest import LikeliestOp, build_chosen, build_parts
from slmtvm.schedules.linear import LinearShape
from slmtvm.target import Target
from tests.emulation.cuda.emulator import Emulated
from tests.schedules import harness
from tests.schedules.attention_cases import attention_shape, cache, projections, random_floats
from tests.schedules.attention_cases import parameters as attention_parameters
from tests.schedules.linear_cases import random_case
from tests.schedules.test_rows import random_inputs, row_op

CPU = Target.load("x86-64-v3")
CUDA = isas.get("cuda")
Arrays = Mapping[str, np.ndarray]
Made = tuple[Kernel, Arrays]


@dataclass(frozen=True)
class Case:
    """``make`` gives the kernel for an ISA, and its inputs."""

    name: str
    make: Callable[[Isa], Made]
    position: int = 0
    valid: int = 0

    def translated(self) -> Node:
        """A node that does nothing else."""
        kernel, _ = self.make(CUDA)
        scratch = kernel.tensors[-1].name == "scratch"
        made = translate(f"case_{self.name}", kernel.func, kernel.scalars, scratch)
        return single(made, [Ref(Space.ARENA, 0, 0)] * len(kernel.tensors), kernel.grid)

    @property
    def one_row(self) -> bool:
        """Whether the persistent kernel may have it, which does a single token."""
        made = self.make(CUDA)[0].tunable
        return made is None or made.shape.m == 1

    def on_cpu(self) -> dict[str, np.ndarray]:
        """What the kernel writes, by name."""
        kernel, inputs = self.make(isas.get(CPU.isa))
        got = harness.run(kernel, dict(inputs), CPU, position=self.position, valid=self.valid)
        return {name: got[name] for name in (*kernel.outputs, *kernel.state)}

    def emulated(
        self, translated: Node, emulated: Emulated, *, order: int = 0, teams: int = 2,
        blocks: int = 2,
    ) -> tuple[str | None, dict[str, np.ndarray]]:  # fmt: skip
        """What the emulator found wrong, and what the kernel wrote, by name."""
        kernel, inputs = self.make(CUDA)
        buffers = []
        for tensor in kernel.tensors:
            given = inputs.get(tensor.name)
            if given is None:
                copies = teams * blocks if tensor.name == "scratch" else 1
                size = -(-int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize // 64) * 64
                buffers.append(np.full(size * copies, 0xA5, np.uint8))
            else:
                buffers.append(np.ascontiguousarray(given).copy())
        wrong = emulated.run(
            translated, buffers, kernel.grid, position=self.position, valid=self.valid,
            teams=teams, blocks=blocks, order=order,
        )  # fmt: skip
        wanted, found = {*kernel.outputs, *kernel.state}, {}
        for tensor, buffer in zip(kernel.tensors, buffers, strict=True):
            if tensor.name in wanted:
                count = int(np.prod(tensor.shape))
                values = buffer.reshape(-1).view(tensor.dtype)[:count]
                found[tensor.name] = values.reshape(tensor.shape)
        return wrong, found


def _linear(shape: LinearShape) -> Case:
    def make(isa: Isa) -> Made:
        case = random_case(shape, isa)
        packed = linear.pack(shape, isa, linear.Weights(**case.weights))
        return linear.build(shape, isa), {**case.activations, **packed, **case.addends}

    return Case(shape.kernel_name("", {}).replace(".", "_"), make)


def _row_pairs(m: int, n: int, k: int, **fields: Any) -> Case:
    """Weights of which two of every four are not 0 at most; a CPU's dense kernel of them."""
    dense = LinearShape(m, n, k, "int8", "row_u8", **fields)

    def make(isa: Isa) -> Made:
        case = random_case(dense, isa)
        rng = np.random.default_rng(11)
        order = rng.random((n, k // 4, 4)).argsort(axis=2)
        kept = order < rng.integers(0, 3, (n, k // 4, 1))
        weights = {**case.weights, "weight": case.weights["weight"] * kept.reshape(n, k)}
        shape = replace(dense, sparse=True, window="2of4") if isa is CUDA else dense
        packed = linear.pack(shape, isa, linear.Weights(**weights))
        return linear.build(shape, isa), {**case.activations, **packed, **case.addends}

    return Case(f"linear_pairs_m{m}_n{n}_k{k}", make)


def _row(prologue: str, epilogue: str, d: int) -> Case:
    op = row_op(prologue, epilogue, d)
    inputs = random_inputs(op)
    return Case(f"row_{prologue}_{epilogue}_{d}", lambda _isa: (rows.build(op), inputs))


def _blocks(prologue: str, d: int) -> Case:
    """The kernel of single blocks, given statistics."""
    op = row_op(prologue, "block", d)
    inputs = random_inputs(op)
    if rows.by_block.has_statistics(op):
        shape = (op.m, 2 if prologue == "layer_norm" else 1)
        inputs[rows.by_block.STATISTICS] = np.abs(random_floats(*shape, seed=3))
    kernel = rows.by_block.build_blocks(op)
    return Case(f"blocks_{prologue}_{d}", lambda _isa: (kernel, inputs))


def _attention(step: str, kv_dtype: str, position: int) -> Case:
    shape = replace(attention_shape(3, 6, 2, 40, 20), kv_dtype=kv_dtype)
    build = {"append": attention.build_append, "attend": attention.build_attend}.get(step)
    given = {**projections(shape), **attention_parameters(shape), **cache(shape, position)}
    if step == "attend":
        # The rows' own keys and values are there already.
        given = {**given, **cache(shape, position + shape.m)}
        given["q"] = random_floats(*shape.q.shape, seed=8)
    if step == "decode":
        build, shape = attention.build_decode, replace(shape, m=1)
        given.update(projections(shape))
    assert build is not None
    return Case(
        f"{step}_{kv_dtype}_{position}",
        lambda isa: (build(replace(shape, native_f16=isa.native_f16)), given),
        position=position,
    )


def _projected(position: int) -> Case:
    """A token whose heads of 40 features are kept as 24."""
    shape = replace(attention_shape(1, 6, 2, 40, 20), head_dim=24, whole=40)
    given = {**projections(shape), **attention_parameters(shape), **cache(shape, position)}
    return Case(
        "decode_projected", lambda _isa: (attention.build_decode(shape), given), position=position
    )


def _head_linear(shape: HeadLinearShape) -> Case:
    kernel = build_head_linear(shape)
    given = {t.name: random_floats(*t.shape, seed=i) for i, t in enumerate(kernel.tensors[:-1])}
    return Case(shape.name, lambda _isa: (kernel, given))


def _decode(name: str, position: int, *, seen: np.ndarray | None = None, **fields: Any) -> Case:
    """A token with the ``fields`` of a shape, or a mask that shows what is ``seen``, (n, n)."""
    shape, lists = attention_shape(1, 6, 2, 40, 20, **fields), {}
    if seen is not None:
        mask, lists = attention.block_tables(seen[None], 2, shape.capacity, rows=32)
        shape = replace(shape, blocks=mask)
    kept = cache(replace(shape, ring=0), position)
    if shape.ring:  # any values that are numbers
        kept = {t.name: cache(shape, shape.capacity)[t.name] for t in shape.cache}
    given = {**projections(shape), **attention_parameters(shape), **kept, **lists}
    return Case(name, lambda _isa: (attention.build_decode(shape), given), position=position)


def _embedding(op: EmbeddingOp) -> Case:
    from tests.schedules.test_embedding import random_tensor

    rng = np.random.default_rng(0)
    kernel = embedding.build(op)
    inputs = {t.name: random_tensor(t, rng) for t in kernel.tensors if t.name != "y"}
    return Case("embedding_" + op.name, lambda _isa: (kernel, inputs))


def _likeliest_parts(count: int, place: int | None = None) -> Case:
    """Logits below 0, many of which are equal; at ``place`` one that is no number."""
    rng = np.random.default_rng(2)
    logits = rng.integers(-9, -1, count).astype(np.float32)
    logits[rng.integers(0, count, count // 9)] = -np.inf
    if place is not None:
        logits[place] = np.nan
    kernel = build_parts(LikeliestOp(count))
    name = f"likeliest_parts_{count}" + ("" if place is None else f"_none_at_{place}")
    return Case(name, lambda _isa: (kernel, {"logits": logits}))


def _likeliest(count: int) -> Case:
    """Parts of logits, those that are greatest in several."""
    op, rng = LikeliestOp(count), np.random.default_rng(3)
    given = {
        "greatest": rng.integers(-9, -6, op.parts).astype(np.float32),
        "places": (np.arange(op.parts) * op.part_size + 3).astype(np.float32),
    }
    return Case(f"likeliest_of_{count}", lambda _isa: (build_chosen(op), given))


BLOCK16 = {"activation": "block", "scale_dtype": "float16"}
CASES = [
    _linear(LinearShape(5, 48, 70, "int4", group_size=32, has_residual=True, **BLOCK16)),
    _linear(LinearShape(1, 7, 100, "int4", "block", 32, has_zero_points=True, has_bias=True)),
    _linear(LinearShape(17, 33, 70, "int8", group_size=32, **BLOCK16)),
    _linear(LinearShape(5, 33, 70, "int8", "row_u8", has_bias=True, has_residual=True)),
    # Two teams' rows: by tensor cores.
    _linear(LinearShape(16, 33, 70, "int4", group_size=32, has_residual=True, **BLOCK16)),
    _linear(LinearShape(32, 17, 200, "int8", group_size=64, **BLOCK16)),
    _linear(LinearShape(16, 33, 96, "int8", "row_u8", has_bias=True)),
    _linear(LinearShape(16, 33, 70, "int2", group_size=32, **BLOCK16)),
    _linear(LinearShape(1, 33, 300, "int2", "block", 32, has_bias=True)),
    _linear(LinearShape(2, 33, 70, "f32", has_bias=True)),
    _row_pairs(1, 33, 192, has_residual=True),
    _row_pairs(5, 17, 64),
    _row_pairs(32, 33, 192, has_bias=True),
    _row("rms_norm", "block", 70),
    _row("layer_norm", "block", 100),
    _row("silu_glu", "block", 45),
    _blocks("layer_norm", 70),
    _blocks("silu_glu", 45),
    _row("copy", "row_u8", 37),
    *(_attention(s, kv, 37) for s in ("append", "attend", "decode") for kv in ("float16", "int8")),
    _decode("decode_int4_ring", 101, kv_dtype="int4", window=21, ring=48, has_sinks=True),
    _decode("decode_list", 101, seen=np.tri(120, dtype=bool) & (np.arange(120) % 50 < 7)
            | np.eye(120, dtype=bool)),
    _projected(37),
    _head_linear(HeadLinearShape(m=2, num_heads=6, groups=2, k=24, n=40, has_bias=True)),
    _embedding(EmbeddingOp(3, 11, 256, "int4", scale_shape=(11, 8), zero_points=True,
                           group_size=32)),
    _embedding(EmbeddingOp(3, 11, 33, "f32")),
    _likeliest_parts(5001),
    _likeliest_parts(101, 70),
    _likeliest(20001),
]  # fmt: skip
