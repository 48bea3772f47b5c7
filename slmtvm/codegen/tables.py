"""A plan as a C source file: the tables of codegen/runtime/plan_tables.h, a wrapper per kernel."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise

from slmtvm.codegen.memory import predict_memory
from slmtvm.codegen.weights import WeightsFile
from slmtvm.passes.exits import FILL, HEAD, STEM
from slmtvm.plan.model import Function, Plan, Space, Step
from slmtvm.target import Target

MAX_ARGS = 32  # SLM_MAX_ARGS of plan_tables.h
_ALIGNMENT = 64  # bytes
_INFO_CHUNK = 100  # characters of a string literal on one line


def kernel_symbol(name: str) -> str:
    """The symbol of kernel ``name`` in the object: it cannot clash with the runtime's."""
    return f"kernel_{name}"


def library_info(plan: Plan, target: Target, weights: WeightsFile) -> dict[str, object]:
    """What slm_info() tells: the plan's own facts and those of the library."""
    return {
        **plan.info,
        "target": target.name,
        "requires": list(target.requires),
        "kind": plan.kind,
        "context": _context(plan),
        "vocab_size": plan.vocab_size,
        "output_size": plan.output_size,
        "outputs": output_facts(plan),
        "source_context": _source_context(plan),
        "mask": plan.mask,
        "segments": plan.segment_types,
        "chunks": sorted({f.rows for f in plan.functions if f.name == "body"}),
        "batches": sorted({f.rows for f in plan.functions if f.name == "batch"}),
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_bytes": plan.kv_bytes,
        "kv_window": kv_window(plan),
        "kernels": [{"name": n, **asdict(plan.kernels[n].work)} for n in sorted(plan.kernels)],
        "memory": asdict(predict_memory(plan, weights.size)),
    }


def kv_window(plan: Plan) -> dict[str, int] | None:
    """What a bundle says of layers that keep a window of positions; None where none do.

    ``positions``: of the smallest one. ``seek_back``: by how many tokens a longer context can go
    back, however its tokens were divided into steps.
    """
    if not plan.ring:
        return None
    back = plan.seek_reach - max(f.rows for f in plan.functions if f.name == "body")
    return {"positions": plan.ring, "seek_back": back}


def output_facts(plan: Plan) -> list[dict[str, object]]:
    """What a bundle says of its outputs."""
    return [{"name": o.name, "features": o.features, "pooled": o.pooled} for o in plan.outputs]


def write_tables(plan: Plan, target: Target, weights: WeightsFile) -> str:
    """The C text for ``plan``, whose weights already lie at the offsets of ``weights``."""
    check_plan(plan, weights.size)
    names = sorted(plan.kernels)
    own = names if target.cuda is None else []  # kernels that this processor runs
    bodies, heads = _functions(plan, "body"), _functions(plan, "head")
    sources = _functions(plan, "source")
    batches = _functions(plan, "batch")
    steps: list[str] = []
    refs: list[str] = []
    rows: dict[str, list[str]] = defaultdict(list)
    for function in functions_in_order(plan):
        rows[function.name].append(f"{{{function.rows}, {len(steps)}, {len(function.steps)}}}")
        for step in function.steps:
            flags = [
                *(["SLM_STEP_PARALLEL"] if _worth_threads(plan, step, function.rows) else []),
                *(["SLM_STEP_BY_SESSION"] if step.by_session else []),
            ]
            steps.append(
                f"{{{names.index(step.kernel)}, {len(step.args)}, {' | '.join(flags) or 0}, "
                f"{len(refs)}, {step.grid}}}"
            )
            refs.extend(f"SLM_REF({ref.space.value}, {ref.offset}u)" for ref in step.args)
            if step.by_session:
                refs.extend(
                    f"SLM_REF({int(written)}, {part}u)"
                    for written, part in _parts(step, function.rows)
                )
    info = json.dumps(library_info(plan, target, weights), sort_keys=True)
    return "\n".join(
        [
            '#include "plan_tables.h"',
            "",
            "/* Hidden, so that the kernels are not exported from the library. */",
            "#pragma GCC visibility push(hidden)",
            *(_declare(plan, name) for name in own),
            *(["extern const struct slm_device slm_cuda_device;"] if target.cuda else []),
            "#pragma GCC visibility pop",
            "",
            *(_wrap(plan, name, index) for index, name in enumerate(own)),
            "",
            _table(
                "static const slm_kernel kernels", [f"call_{i}" for i in range(len(own))] or ["0"]
            ),
            _table("static const uint64_t refs", refs or ["0"]),
            _table("static const slm_step steps", steps),
            _table("static const slm_function bodies", rows["body"]),
            _table("static const slm_function heads", rows["head"] or ["{0, 0, 0}"]),
            _table("static const slm_function sources", rows["source"] or ["{0, 0, 0}"]),
            _table("static const slm_function batches", rows["batch"] or ["{0, 0, 0}"]),
            _table("static const slm_function batch_heads", rows["batchhead"] or ["{0, 0, 0}"]),
            _table("static const slm_exit exits", _exits(plan, rows)),
            _table(
                "static const slm_plan_output outputs",
                [
                    f"{{{_literal(o.name)}, {o.features}, {int(o.pooled)}, {o.offset}u}}"
                    for o in plan.outputs
                ],
            ),
            _table(
                "static const char *const requires",
                [*(_literal(name) for name in target.requires), "0"],
            ),
            f"static const char info[] =\n{_long_literal(info)};",
            "",
            _fields(
                {
                    "info": "info",
                    "target": _literal(target.name),
                    "requires": "requires",
                    "kernels": "kernels",
                    "device": "&slm_cuda_device" if target.cuda else "0",
                    "steps": "steps",
                    "refs": "refs",
                    "bodies": "bodies",
                    "heads": "heads",
                    "sources": "sources",
                    "batches": "batches",
                    "batch_heads": "batch_heads",
                    "exits": "exits",
                    "outputs": "outputs",
                    "kernel_count": len(names),
                    "body_count": len(bodies),
                    "head_count": len(heads),
                    "source_count": len(sources),
                    "batch_count": len(batches),
                    "exit_count": len(plan.exits),
                    "output_count": len(plan.outputs),
                    "encoder": int(plan.kind == "encoder"),
                    "context": _context(plan),
                    "source_context": _source_context(plan),
                    "capacity": plan.capacity,
                    "threads": plan.threads,
                    "ring": plan.ring,
                    "seek_reach": plan.seek_reach,
                    "mask": f"SLM_MASK_{plan.mask.upper()}",
                    "weights_have_places": int(plan.weights_have_places),
                    "segment_types": plan.segment_types,
                    "final_token": -1 if plan.final_token is None else plan.final_token,
                    "segments_offset": f"{plan.segment_ids.offset if plan.segment_ids else 0}u",
                    "limits_offset": f"{plan.limits.offset if plan.limits else 0}u",
                    "vocab_size": plan.vocab_size,
                    "output_size": plan.output_size,
                    "hidden_size": plan.hidden_size,
                    "hidden_offset": f"{plan.hidden.offset}u",
                    "state_bytes": f"{plan.state_bytes}u",
                    "arena_bytes": f"{plan.arena_bytes}u",
                    "scratch_bytes": f"{plan.scratch_bytes}u",
                    "output_bytes": f"{plan.output_bytes}u",
                    "weights_bytes": f"{weights.size}u",
                    "weights_id": f"{weights.content_id}u",
                    "weights_count": f"{len(weights.segments)}u",
                }
            ),
            "",
        ]
    )


def check_plan(plan: Plan, weights_bytes: int) -> None:
    """Raise ValueError where ``plan`` would read or write outside its memory, or cannot be run.

    The runtime trusts its tables: what is wrong in a plan must be found before it becomes one.
    """
    bodies, heads = _functions(plan, "body"), _functions(plan, "head")
    kinds = ("decoder", "encoder", "encoder-decoder")
    _require(plan.kind in kinds, f"unknown kind {plan.kind!r}")
    _require(bool(bodies), "no body")
    _require(bool(heads) == (plan.kind != "encoder"), "a decoder has heads, an encoder none")
    sources = _functions(plan, "source")
    _require(bool(sources) == (plan.kind == "encoder-decoder"), "what has a source reads one")
    _require(plan.scratch_bytes % _ALIGNMENT == 0, "scratch_bytes is not a multiple of 64")
    if plan.kind != "encoder":
        _require(plan.hidden.space == Space.ARENA, "the hidden rows are not in the arena")
        smallest = bodies[-1].rows
        _require(
            plan.capacity >= plan.context + smallest - 1,
            f"capacity {plan.capacity} is too small for context {plan.context} in chunks of "
            f"{smallest}",
        )
        most = max(f.rows for f in plan.functions if f.name != "source")
        _require(
            plan.hidden.size >= most * plan.hidden_size * 4, f"hidden does not hold {most} rows"
        )
    _check_batches(plan)
    _check_exits(plan)
    _check_outputs(plan)
    _check_mask(plan)
    _check_segments(plan)
    limits = {
        Space.WEIGHTS: weights_bytes,
        Space.STATE: plan.state_bytes,
        Space.ARENA: plan.arena_bytes,
        Space.SCRATCH: plan.scratch_bytes,
    }
    for function in plan.functions:
        own = {Space.TOKENS: function.rows * 4}
        places = _output_places(plan, function)
        for step in function.steps:
            where = f"{function.name} of {function.rows} rows, {step.kernel}"
            _require(step.kernel in plan.kernels, f"{where}: no such kernel")
            _require(0 < step.grid < 2**31, f"{where}: grid {step.grid}")
            _require(
                len(step.args) == plan.kernels[step.kernel].buffers <= MAX_ARGS,
                f"{where}: {len(step.args)} arguments",
            )
            for ref in step.args:
                end = ref.offset + ref.size
                _require(ref.offset % _ALIGNMENT == 0 and 0 <= ref.offset <= end, f"{where}: {ref}")
                if ref.space == Space.OUTPUT:
                    _require(ref.offset in places, f"{where}: {ref} is no output")
                    limit = places[ref.offset]
                else:
                    limit = {**limits, **own}[ref.space]
                _require(end <= limit, f"{where}: {ref} ends behind {limit}")
            _check_by_session(step, function, where)


def _output_places(plan: Plan, function: Function) -> dict[int, int]:
    """Where in the space OUTPUT each value that ``function`` returns begins and ends."""
    if function.name == "source":
        return {0: function.rows * plan.hidden_size * 4}
    one = plan.kind == "encoder"
    return {
        o.offset: o.offset + (1 if one and o.pooled else function.rows) * o.features * 4
        for o in plan.outputs
    }


def _check_batches(plan: Plan) -> None:
    batches, heads = _functions(plan, "batch"), _functions(plan, "batchhead")
    _require([f.rows for f in batches] == [f.rows for f in heads], "a batch has a head of its own")
    _require(plan.kind != "encoder" or not batches, "an encoder has no sessions to batch")
    most = _functions(plan, "body")[0].rows
    _require(all(1 < f.rows <= most for f in batches), f"a batch of one row, or more than {most}")
    for function in (*batches, *heads):
        for step in function.steps:
            knows = "position" in plan.kernels[step.kernel].scalars or any(
                ref.space == Space.STATE for ref in step.args
            )
            _require(step.by_session or not knows, f"{step.kernel}: of which session?")


def _check_exits(plan: Plan) -> None:
    count = len(plan.exits)
    if not count:
        return
    _require(plan.kind == "decoder", "exits of what is no decoder")
    _require(len(plan.outputs) == 1 and not plan.outputs[0].pooled, "exits have one output")
    _require(all(0 <= margin < float("inf") for margin in plan.exits), f"margins {plan.exits}")
    _require(_functions(plan, "head")[-1].rows == 1, "no head of one row")
    wanted = [f"{kind}{i}" for i in range(count) for kind in (STEM, HEAD, FILL)]
    for name in (*wanted, f"{STEM}{count}"):
        _require([f.rows for f in _functions(plan, name)] == [1], f"{name} is of one row")


def _check_by_session(step: Step, function: Function, where: str) -> None:
    if not step.by_session:
        return
    _require(function.name in ("batch", "batchhead"), f"{where}: one session, called by session")
    spaces = (Space.ARENA, Space.STATE, Space.WEIGHTS, Space.SCRATCH)
    _require(all(ref.space in spaces for ref in step.args), f"{where}: {step.args}")
    inputs = len([ref for ref in step.args if ref.space != Space.SCRATCH])
    _require(0 <= step.outputs <= inputs, f"{where}: {step.outputs} outputs")
    for ref, (written, part) in zip(step.args, _parts(step, function.rows), strict=True):
        _require(part % _ALIGNMENT == 0, f"{where}: parts of {part} bytes")
        _require(part * function.rows == ref.size or not part, f"{where}: parts of {ref}")
        _require(part > 0 or not written, f"{where}: {ref} is written by all sessions")


def _parts(step: Step, rows: int) -> list[tuple[bool, int]]:
    """Of each argument of a step by session: is it written, and the bytes of a row's part of it."""
    end = len(step.args) - (step.args[-1].space == Space.SCRATCH)
    return [
        (end - step.outputs <= index < end, ref.size // rows if ref.space == Space.ARENA else 0)
        for index, ref in enumerate(step.args)
    ]


def _check_outputs(plan: Plan) -> None:
    _require(bool(plan.outputs), "no output")
    bodies, heads = _functions(plan, "body"), _functions(plan, "head")
    largest = (heads or bodies)[0]
    places = sorted(_output_places(plan, largest).items())
    _require(len(places) == len(plan.outputs), "two outputs begin at one place")
    for (_, end), (begin, _) in pairwise(places):
        _require(end <= begin, f"an output ends at {end}, behind the next one's begin at {begin}")


def _check_mask(plan: Plan) -> None:
    _require(plan.mask in ("none", "keys", "skip"), f"unknown mask {plan.mask!r}")
    _require((plan.mask == "keys") == (plan.limits is not None), "hidden keys need limits")
    if plan.limits is None:
        return
    positions = {"decoder": plan.capacity, "encoder": _context(plan)}
    most = positions.get(plan.kind, _source_context(plan))
    _require(plan.limits.space == Space.STATE, "the limits are not in the state")
    _require(plan.limits.offset % _ALIGNMENT == 0, "the limits are not aligned")
    _require(plan.limits.size >= most * 4, f"the limits do not hold {most} positions")
    end = plan.limits.offset + plan.limits.size
    _require(end <= plan.state_bytes, "the limits end behind the state")


def _check_segments(plan: Plan) -> None:
    ids = plan.segment_ids
    _require((plan.segment_types > 0) == (ids is not None), "segments need a place")
    if ids is None:
        return
    _require(plan.kind == "encoder", "an encoder alone has segments")
    _require(ids.space == Space.STATE and ids.offset % _ALIGNMENT == 0, f"segments in {ids}")
    _require(ids.size >= _functions(plan, "body")[0].rows * 4, "the segments do not hold all rows")
    _require(ids.offset + ids.size <= plan.state_bytes, "the segments end behind the state")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"bad plan: {message}")


def _functions(plan: Plan, name: str) -> list[Function]:
    return sorted((f for f in plan.functions if f.name == name), key=lambda f: -f.rows)


def functions_in_order(plan: Plan) -> list[Function]:
    """The functions in the order in which the table of steps has theirs."""
    names = ("body", "head", "source", "batch", "batchhead")
    count = len(plan.exits)
    exits = [f"{kind}{i}" for i in range(count) for kind in (STEM, HEAD, FILL)]
    last = [f"{STEM}{count}"] if count else []
    return [f for name in (*names, *exits, *last) for f in _functions(plan, name)]


def _exits(plan: Plan, rows: dict[str, list[str]]) -> list[str]:
    """An entry for each exit, and one for what lies behind the last, which has a stem alone."""
    none, count = "{0, 0, 0}", len(plan.exits)
    entries = [
        f"{{{rows[f'{STEM}{i}'][0]}, {rows[f'{HEAD}{i}'][0]}, {rows[f'{FILL}{i}'][0]}, "
        f"{float(margin).hex()}f}}"
        for i, margin in enumerate(plan.exits)
    ]
    last = rows[f"{STEM}{count}"][0] if count else none
    return [*entries, f"{{{last}, {none}, {none}, 0.0f}}"]


def _context(plan: Plan) -> int:
    if plan.kind != "encoder":
        return plan.context
    return min(plan.context, _functions(plan, "body")[0].rows)


def _source_context(plan: Plan) -> int:
    rows = [f.rows for f in plan.functions if f.name == "source"]
    return min(plan.source_context, max(rows, default=0))


def _worth_threads(plan: Plan, step: Step, rows: int) -> bool:
    """With few bytes of operands a step takes less time than telling other threads about it."""
    blocks = step.grid * rows if step.by_session else step.grid
    return blocks > 1 and sum(ref.size for ref in step.args) >= plan.parallel_bytes


def _declare(plan: Plan, name: str) -> str:
    code = plan.kernels[name]
    types = ["void *"] * code.buffers + ["int32_t"] * (len(code.scalars) + 2)
    return f"void {kernel_symbol(name)}({', '.join(types)});"


def _wrap(plan: Plan, name: str, index: int) -> str:
    code = plan.kernels[name]
    given = [*(f"a[{i}]" for i in range(code.buffers)), *code.scalars, "begin", "end"]
    unused = "".join(f"  (void){s};\n" for s in ("position", "valid") if s not in code.scalars)
    return (
        f"static void call_{index}(void **a, int32_t position, int32_t valid, int32_t begin,\n"
        f"                   int32_t end) {{\n{unused}"
        f"  {kernel_symbol(name)}({', '.join(given)});\n}}"
    )


def _table(declaration: str, entries: Sequence[str]) -> str:
    lines = "".join(f"  {entry},\n" for entry in entries)
    return f"{declaration}[] = {{\n{lines}}};"


def _fields(values: dict[str, object]) -> str:
    lines: Iterable[str] = (f"  .{name} = {value},\n" for name, value in values.items())
    return f"const slm_plan_tables slm_plan = {{\n{''.join(lines)}}};"


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?")
    return f'"{escaped}"'


def _long_literal(text: str) -> str:
    pieces = [text[i : i + _INFO_CHUNK] for i in range(0, len(text), _INFO_CHUNK)]
    return "\n".join(f"    {_literal(piece)}" for piece in pieces)
