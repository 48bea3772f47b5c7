"""Early exits: a decoder's ``main`` in pieces that end where a token may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import tvm
from tvm import relax

from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, Exit
from slmtvm.passes.rewrite import bindings, function_names, results
from slmtvm.passes.split_head import cut_of, extract, needed_by

STEM, HEAD, FILL = "stem", "exithead", "fill"
"""Begin the names of the functions of exit 0, 1, ... that ``with_exits`` makes."""


def with_exits(model: CanonicalModel, exits: Sequence[Exit]) -> CanonicalModel:
    """``model`` with functions of one token that can end at ``exits``.

    ``stem0`` makes of a token the hidden row at the first exit, ``stem1`` of this the one at the
    next, and the last stem of that at the last exit what ``head`` reads. ``exithead0`` makes the
    logits of the first exit, by the output that the exit names, which ``main`` then has no more,
    or by the model's own head. ``fill0`` appends to the caches of all layers behind the first exit
    the keys and values that they would make of its hidden row.

    Raises SlmError where an exit is at no layer or names no output of logits, UnsupportedOpError
    where the model has no place where a token could end there.
    """
    where = str(model.source)
    if model.kind != "decoder":
        raise UnsupportedOpError(
            f"early exits of an {model.kind}; a decoder can have them", where=where
        )
    main = model.module["main"]
    values = {b.var: b.value for b in bindings(main)}
    if any(isinstance(v, relax.Call) and v.op == ops.CAUSAL_CONV for v in values.values()):
        raise UnsupportedOpError(
            "early exits beside convolutions over earlier tokens: what these remember of a token "
            "that ended cannot be filled in; compile the model without --exit",
            where=where,
        )
    outputs = dict(zip(_names(model), results(main), strict=True))
    named = _checked(model, exits, outputs)
    kept = [name for name in outputs if name not in named]
    if len(kept) != 1:
        raise SlmError(
            f"{len(kept)} outputs beside the exits ({', '.join(kept)}); a model with exits has "
            "one: name it, and the exits, with --outputs",
            where=where,
        )
    final = outputs[kept[0]]
    cuts = _cuts(main, cut_of(main, final))
    places = [_place(model, exit_, cuts, outputs) for exit_ in exits]
    functions = {n: model.module[n] for n in function_names(model.module)}
    functions["main"] = extract(main, "main", [final], main.params[0], _same(main))
    ends = [*places, len(cuts)]
    for index, end in enumerate(ends):
        functions[f"{STEM}{index}"] = _stem(main, index, ends, cuts)
        if index < len(exits):
            name = exits[index].name
            output = outputs[name] if name else final
            behind = cuts[end - 1] if name else cuts[-1]
            hidden = _hidden(cuts[end - 1])
            functions[f"{HEAD}{index}"] = extract(
                main, f"{HEAD}{index}", [output], hidden, _same(main) | {behind: hidden}
            )
            functions[f"{FILL}{index}"] = _fill(main, index, cuts[end - 1 : -1])
    return replace(
        model,
        module=tvm.IRModule(functions),
        outputs=tuple(o for o in model.outputs if o.name not in named),
        exits=tuple(replace(e, layer=p) for e, p in zip(exits, places, strict=True)),
    )


def exit_index(function: str) -> int:
    """Of which exit a function is, -1 for one of none."""
    for kind in (STEM, HEAD, FILL):
        if function.startswith(kind):
            return int(function.removeprefix(kind).split("_")[0])
    return -1


def takes_hidden_row(kind: str) -> bool:
    """Whether a function of exits reads a hidden row, not a token."""
    return exit_index(kind) >= 0 and kind != f"{STEM}0"


def _names(model: CanonicalModel) -> list[str]:
    return [o.name for o in model.outputs] or [""]


def _checked(
    model: CanonicalModel, exits: Sequence[Exit], outputs: dict[str, relax.Var]
) -> set[str]:
    """The outputs that exits give."""
    layers, where = len(model.kv), str(model.source)
    for exit_ in exits:
        if exit_.name and exit_.name not in outputs:
            raise SlmError(
                f"no output {exit_.name!r} to exit at; there are {', '.join(outputs)}",
                where=where,
            )
        if not exit_.name and not 0 < exit_.layer < layers:
            raise SlmError(
                f"an exit after layer {exit_.layer}; the model has {layers}: 1 to {layers - 1}",
                where=where,
            )
    return {exit_.name for exit_ in exits if exit_.name}


def _cuts(main: relax.Function, final: relax.Var) -> list[relax.Var | None]:
    """After each attention, the last value that all that follows is made of, if there is one; at
    last what the head reads."""
    attentions = [
        b.var
        for b in bindings(main)
        if isinstance(b.value, relax.Call) and b.value.op == ops.ATTENTION
    ]
    attentions.sort(key=lambda var: int(_layer_of(main, var)))
    before = [needed_by(main, var, set()) for var in attentions]
    cuts: list[relax.Var | None] = []
    for index, attention in enumerate(attentions[:-1]):
        found = None
        for binding in bindings(main):
            var = binding.var
            if var not in before[index + 1] or len(getattr(var.ty, "shape", ())) != 2:
                continue
            needs = needed_by(main, var, set())
            if attention in needs and _all_through(main, final, var):
                found = var
        cuts.append(found)
    return [*cuts, final]


def _layer_of(main: relax.Function, attention: relax.Var) -> int:
    values = {b.var: b.value for b in bindings(main)}
    return int(values[attention].attrs["layer"])


def _all_through(main: relax.Function, final: relax.Var, var: relax.Var) -> bool:
    """Whether what ``final`` needs behind ``var`` needs no token and no attention before it."""
    behind = needed_by(main, final, {var}) - {var}
    before = needed_by(main, var, set())
    tokens = main.params[0]
    return not any(
        _reads(b.value, tokens) or (b.var in before and _is_attention(b.value))
        for b in bindings(main)
        if b.var in behind
    )


def _reads(value: relax.Expr, var: relax.Var) -> bool:
    return isinstance(value, relax.Call) and any(a.same_as(var) for a in value.args)


def _is_attention(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and value.op == ops.ATTENTION


def _place(
    model: CanonicalModel,
    exit_: Exit,
    cuts: Sequence[relax.Var | None],
    outputs: dict[str, relax.Var],
) -> int:
    """After how many layers the exit is; what lies there and behind it must be cut."""
    main, where = model.module["main"], str(model.source)
    layer = exit_.layer
    if exit_.name:
        output = outputs[exit_.name]
        at = cut_of(main, output)
        if at not in cuts[:-1]:
            raise UnsupportedOpError(
                f"{exit_.name!r} is not made of the rows between two layers alone, so that a "
                "token cannot end there",
                where=where,
            )
        layer = cuts.index(at) + 1
    missing = [i + 1 for i in range(layer - 1, len(cuts) - 1) if cuts[i] is None]
    if missing:
        raise UnsupportedOpError(
            f"an exit after layer {layer}: what layer {missing[0] + 1} reads is not one row that "
            f"all layers up to {missing[0]} made, so that there is nothing to fill its cache with",
            where=where,
        )
    here, last = cuts[layer - 1], cuts[-1]
    assert here is not None and last is not None
    width, wanted = (int(v.ty.shape.values[1]) for v in (here, last))
    if not exit_.name and width != wanted:
        raise UnsupportedOpError(
            f"an exit after layer {layer}: its rows have {width} features, and the head reads "
            f"{wanted}",
            where=where,
        )
    return layer


def _same(main: relax.Function) -> dict[relax.Var, relax.Expr]:
    return {p: p for p in main.params}


def _hidden(cut: relax.Var) -> relax.Var:
    return relax.Var("hidden", relax.TensorType(cut.ty.shape.values, "float32"))


def _stem(
    main: relax.Function, index: int, ends: Sequence[int], cuts: Sequence[relax.Var]
) -> relax.Function:
    name, end = f"{STEM}{index}", cuts[ends[index] - 1]
    if index == 0:
        return extract(main, name, [end], main.params[0], _same(main))
    begin = cuts[ends[index - 1] - 1]
    hidden = _hidden(begin)
    given = _same(main) | {begin: hidden}
    # It lies where the row that is read does: written when everything has read that.
    return extract(main, name, [end], hidden, given, in_place=True)


def _fill(main: relax.Function, index: int, cuts: Sequence[relax.Var]) -> relax.Function:
    """The attentions behind the first of ``cuts``, each of the one hidden row."""
    before = needed_by(main, cuts[0], set())
    skipped = [b.var for b in bindings(main) if _is_attention(b.value) and b.var not in before]
    hidden = _hidden(cuts[0])
    given = _same(main) | dict.fromkeys(cuts, hidden)
    return extract(main, f"{FILL}{index}", skipped, hidden, given)
