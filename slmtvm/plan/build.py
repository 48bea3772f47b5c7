"""Lowered Relax -> static plan: every kernel call with the bytes it touches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from tvm import relax, tirx
from tvm.ir import Op

from slmtvm.ir.lowered import CALL_KERNEL, LoweredModel
from slmtvm.ir.model import CanonicalModel, Output
from slmtvm.passes.exits import FILL, STEM, takes_hidden_row
from slmtvm.passes.lower_kernels.cross_attention import SOURCE_CACHE
from slmtvm.passes.lower_kernels.masks import LIMITS
from slmtvm.passes.lower_kernels.positions import SEGMENTS
from slmtvm.passes.rewrite import bindings, function_names, results
from slmtvm.plan.arena import Lifetime, align, place
from slmtvm.plan.model import (
    Function,
    KernelCode,
    KernelWork,
    Plan,
    PlanOutput,
    Ref,
    Segment,
    Space,
    Step,
)
from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.plan.work import kernel_work, mean_work
from slmtvm.schedules.kernel import Kernel, Tensor

_FLOAT_BYTES = 4


def build_plan(
    lowered: LoweredModel, info: dict[str, object], setup: Setup = DEFAULT_SETUP
) -> Plan:  # fmt: skip
    """The plan of one target; ``info`` goes into it unread, as do ``setup``'s facts of threads."""
    model = lowered.model
    segments, weight_refs = _lay_out_weights(lowered.weights)
    state_refs, state_bytes = _lay_out_state(lowered.state)
    names = function_names(lowered.module)
    body_rows = max(int(n.split("_")[1]) for n in names if n.startswith("body"))
    decodes = model.kind != "encoder"
    # What body hands to head need not be as wide as the rows between layers (a projected head).
    widths = _widths(lowered.module[f"body_{body_rows}"])
    width = widths[0]
    hidden_bytes = body_rows * width * _FLOAT_BYTES if decodes else 0
    if decodes:
        head_rows = max(int(n.split("_")[1]) for n in names if n.startswith("head"))
        widths = _widths(lowered.module[f"head_{head_rows}"])
    outputs = _lay_out_outputs(model, widths, body_rows)
    hidden = Ref(Space.ARENA, 0, hidden_bytes)
    functions, kernels, arena, scratch = [], {}, align(hidden_bytes), 0
    for name in sorted(names, key=lambda n: (n.split("_")[0], int(n.split("_")[1]))):
        kind, rows = name.split("_")
        writer = _FunctionWriter(lowered, {**weight_refs, **state_refs})
        steps, end = writer.write(name, kind, hidden, _places(kind, model.kind, outputs))
        functions.append(Function(kind, int(rows), tuple(steps)))
        kernels.update(writer.kernels)
        arena, scratch = max(arena, end), max(scratch, writer.scratch_bytes)
    return Plan(
        kind=model.kind,
        functions=tuple(functions),
        kernels=kernels,
        segments=tuple(segments),
        context=model.context,
        capacity=lowered.capacity,
        vocab_size=model.vocab_size,
        outputs=outputs,
        hidden=hidden,
        hidden_size=width,
        state_bytes=state_bytes,
        arena_bytes=arena,
        scratch_bytes=scratch,
        kv_bytes_per_token=_bytes_per_token(lowered),
        kv_bytes=sum(map(_bytes, _own_cache(lowered).values())),
        ring=min(lowered.rings.values(), default=0),
        seek_reach=lowered.seek_reach,
        exits=tuple(e.margin for e in model.exits),
        source_context=model.source_context,
        mask=model.mask,
        limits=state_refs.get(LIMITS),
        weights_have_places=any(
            t.at_most for kernel in lowered.kernels.values() for t in kernel.tensors
        ),
        segment_types=model.segments,
        final_token=model.final_token,
        segment_ids=state_refs.get(SEGMENTS),
        parallel_bytes=setup.parallel_bytes,
        threads=setup.threads,
        info=info,
    )


def _widths(function: relax.Function) -> list[int]:
    """Features of each value that a function returns."""
    returned = function.ret_ty
    types = list(returned.fields) if isinstance(returned, relax.TupleType) else [returned]
    return [int(type_.shape.values[1]) for type_ in types]


def _lay_out_outputs(
    model: CanonicalModel, widths: list[int], body_rows: int
) -> tuple[PlanOutput, ...]:
    """The outputs, each where it lies for any number of rows."""
    named = model.outputs or tuple(Output("", width) for width in widths)
    outputs, offset = [], 0
    for output, width in zip(named, widths, strict=True):
        outputs.append(PlanOutput(output.name, width, output.pooled, offset))
        rows = 1 if output.pooled else body_rows
        offset += align(rows * width * _FLOAT_BYTES)
    return tuple(outputs)


def _places(kind: str, model_kind: str, outputs: tuple[PlanOutput, ...]) -> list[int] | None:
    """Offsets in the space OUTPUT of what a function returns; None where that is hidden rows."""
    if kind == "body":
        return [o.offset for o in outputs] if model_kind == "encoder" else None
    if kind == "batch" or kind.startswith((STEM, FILL)):
        return None
    return [0] if kind == "source" else [o.offset for o in outputs]


def _own_cache(lowered: LoweredModel) -> dict[str, Tensor]:
    """The state that grows with the context, or a window of it."""
    return {
        name: tensor for name, tensor in lowered.state.items()
        if name not in (LIMITS, SEGMENTS) and not name.startswith(SOURCE_CACHE)
    }  # fmt: skip


def _bytes_per_token(lowered: LoweredModel) -> int:
    """Of what a position has in all layers."""
    rings = lowered.rings
    return sum(
        _bytes(tensor) // rings.get(name, lowered.capacity)
        for name, tensor in _own_cache(lowered).items()
    )


def _lay_out_weights(weights: dict[str, np.ndarray]) -> tuple[list[Segment], dict[str, Ref]]:
    segments, refs, offset = [], {}, 0
    for name, array in weights.items():
        segments.append(Segment(name, offset, np.ascontiguousarray(array)))
        refs[name] = Ref(Space.WEIGHTS, offset, array.nbytes)
        offset += align(array.nbytes)
    return segments, refs


def _lay_out_state(state: dict[str, Tensor]) -> tuple[dict[str, Ref], int]:
    refs, offset = {}, 0
    for name, tensor in state.items():
        size = _bytes(tensor)
        refs[name] = Ref(Space.STATE, offset, size)
        offset += align(size)
    return refs, offset


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _type_bytes(tensor: relax.TensorType) -> int:
    itemsize = np.dtype(str(tensor.dtype)).itemsize
    return math.prod(int(d) for d in tensor.shape.values) * itemsize


@dataclass
class _Value:
    """A buffer that one call writes and later calls read."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class _Call:
    """A kernel's call on parameters, and ``_Value``s by index; the last ``outputs`` are written."""

    kernel: str
    operands: list[relax.Var | int]
    grid: int
    scratch: int  # bytes
    outputs: int
    by_session: bool


@dataclass
class _FunctionWriter:
    """Turns one Relax function into steps; collects the kernels they name."""

    lowered: LoweredModel
    params: dict[str, Ref]
    kernels: dict[str, KernelCode] = field(default_factory=dict)
    works: dict[str, list[KernelWork]] = field(default_factory=dict)
    scratch_bytes: int = 0

    def write(
        self, name: str, kind: str, hidden: Ref, places: list[int] | None
    ) -> tuple[list[Step], int]:
        """The steps, and the end of the arena that they use; ``places`` as ``_places`` has it."""
        function = self.lowered.module[name]
        fixed: dict[relax.Var, Ref] = {p: self.params[p.name] for p in function.params[1:]}
        step_input = function.params[0]
        size = _type_bytes(step_input.ty)
        is_head = kind in ("head", "batchhead") or takes_hidden_row(kind)
        fixed[step_input] = (
            Ref(Space.ARENA, hidden.offset, size) if is_head else Ref(Space.TOKENS, 0, size)
        )
        # What each variable stands for: the buffers of the call that made it.
        made: dict[relax.Var, list[relax.Var | int]] = {p: [p] for p in fixed}
        values: list[_Value] = []
        calls: list[_Call] = []
        for binding in bindings(function):
            value = binding.value
            if isinstance(value, relax.Var):
                made[binding.var] = made[value]
            elif isinstance(value, relax.Tuple):
                made[binding.var] = [made[f][0] for f in value.fields]
            elif isinstance(value, relax.TupleGetItem):
                made[binding.var] = [made[value.tuple_value][value.index]]
            else:
                made[binding.var] = self._call(value, binding.var.ty, made, values, calls)
        returned = [made[v][0] for v in results(function)]
        outputs = [operand for operand in returned if isinstance(operand, int)]
        if kind.startswith(FILL):
            outputs, places = [], []  # what it makes is the state
        refs = self._place(values, outputs, hidden, places)
        steps = []
        for call in calls:
            args = [refs[o] if isinstance(o, int) else fixed[o] for o in call.operands]
            if call.scratch:
                args.append(Ref(Space.SCRATCH, 0, call.scratch))
            by_session = call.by_session
            steps.append(
                Step(call.kernel, tuple(args), call.grid, by_session, call.outputs * by_session)
            )
            if not by_session:
                self._note_work(call.kernel, args)
        ends = [r.offset + align(r.size) for r in refs if r.space == Space.ARENA]
        return steps, max(ends, default=0)

    def _call(
        self,
        call: relax.Call,
        type_: relax.Type,
        made: dict[relax.Var, list[relax.Var | int]],
        values: list[_Value],
        calls: list[_Call],
    ) -> list[relax.Var | int]:
        if call.op == CALL_KERNEL:
            name, inputs = str(call.attrs["kernel"]), list(call.args)
        else:
            assert call.op == Op.get("relax.call_tir"), call.op
            name, inputs = call.args[0].name_hint, list(call.args[1].fields)
        operands = [made[a][0] for a in inputs]
        now = len(calls)
        for operand in operands:
            if isinstance(operand, int):
                values[operand].last = now
        types = list(type_.fields) if isinstance(type_, relax.TupleType) else [type_]
        outputs: list[relax.Var | int] = []
        for field_type in types:
            outputs.append(len(values))
            values.append(_Value(_type_bytes(field_type), now, now))
        grid, scratch = self._kernel(name)
        by_session = call.op == CALL_KERNEL and bool(int(call.attrs["by_session"]))
        calls.append(_Call(name, [*operands, *outputs], grid, scratch, len(outputs), by_session))
        return outputs

    def _kernel(self, name: str) -> tuple[int, int]:
        """Note the code of the kernel; its grid and its bytes of scratch."""
        kernel = self.lowered.kernels.get(name)
        if kernel is None:
            func = _with_grid(self.lowered.module[name])
            self.kernels[name] = KernelCode(func, len(func.params) - 2, ())
            return 1, 0
        self.kernels[name] = KernelCode(
            kernel.func,
            len(kernel.tensors),
            kernel.scalars,
            tunable=kernel.tunable,
            runs=kernel.runs,
        )
        scratch = _scratch_bytes(kernel)
        self.scratch_bytes = max(self.scratch_bytes, align(scratch))
        return kernel.grid, scratch

    def _note_work(self, name: str, args: list[Ref]) -> None:
        kernel, code = self.lowered.kernels.get(name), self.kernels[name]
        if kernel is not None:
            self.works.setdefault(name, []).append(kernel_work(kernel, args))
            self.kernels[name] = replace(code, work=mean_work(self.works[name]))

    def _place(
        self, values: list[_Value], outputs: list[int], hidden: Ref, places: list[int] | None
    ) -> list[Ref]:
        inside = [i for i in range(len(values)) if i not in outputs]
        longer = int(self.lowered.calls_join)
        lifetimes = [
            Lifetime(values[i].size, values[i].first, values[i].last + longer) for i in inside
        ]
        offsets, _ = place(lifetimes, base=align(hidden.size))
        refs: dict[int, Ref] = {
            i: Ref(Space.ARENA, o, values[i].size) for i, o in zip(inside, offsets, strict=True)
        }
        space = Space.ARENA if places is None else Space.OUTPUT
        into = [hidden.offset] if places is None else places
        for output, offset in zip(outputs, into, strict=True):
            refs[output] = Ref(space, offset, values[output].size)
        return [refs[i] for i in range(len(values))]


def _scratch_bytes(kernel: Kernel) -> int:
    return sum(_bytes(t) for t in kernel.tensors if t.name == "scratch")


def _with_grid(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A PrimFunc of TVM's own as a kernel of one block: begin and end are taken and ignored."""
    bounds: Iterable[tirx.Var] = (tirx.Var("begin", "int32"), tirx.Var("end", "int32"))
    return tirx.PrimFunc([*func.params, *bounds], func.body, func.ret_type, func.attrs)
