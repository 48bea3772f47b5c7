"""What attentions of a model see of a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import attention, evaluate_results
from slmtvm.ir.reference.weights import dequantize
from slmtvm.passes.rewrite import bindings, results, variables
from slmtvm.passes.split_head import extract

_PLACES = 8  # in the context that a window is moved to, where positions rotate it

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class SeenLayer:
    """What one attention saw: rows (m, heads, D) of queries and keys before and after their
    rotation, of values and of results."""

    q_before: Floats
    k_before: Floats
    q: Floats
    k: Floats
    v: Floats
    o: Floats


class Seen:
    """Evaluates a model and keeps what its attentions see."""

    def __init__(self, model: CanonicalModel) -> None:
        main = model.module["main"]
        self._values = {b.var: b.value for b in bindings(main)}
        found = [
            (int(v.attrs["layer"]), var, v)
            for var, v in self._values.items()
            if isinstance(v, relax.Call) and v.op == ops.ATTENTION
        ]
        found.sort(key=lambda entry: entry[0])
        self._attentions = [var for _, var, _ in found]
        self.calls = [call for _, _, call in found]
        self._main, self._model = main, model
        wanted: list[relax.Var] = []
        for var, call in zip(self._attentions, self.calls, strict=True):
            q, k, v = call.args[:3]
            wanted += [self._before(q), self._before(k), q, k, v, var]
        function = extract(
            main, "main", [*wanted, results(main)[0]], main.params[0], {p: p for p in main.params}
        )
        self._probe = replace(model, module=tvm.IRModule({"main": function}))

    def _before(self, x: relax.Var) -> relax.Var:
        rotation = self.rotation(x)
        return x if rotation is None else rotation.args[0]

    def rotation(self, x: relax.Var) -> relax.Call | None:
        value = self._values.get(x)
        return value if isinstance(value, relax.Call) and value.op == ops.ROPE else None

    def of(self, tokens: Tokens) -> tuple[list[SeenLayer], Floats]:
        """What each attention sees of ``tokens``, and the logits."""
        *found, logits = evaluate_results(self._probe, "main", np.asarray(tokens, np.int32))
        layers = []
        for i, call in enumerate(self.calls):
            heads, kv_heads = int(call.attrs["num_heads"]), int(call.attrs["num_kv_heads"])
            counts = (heads, kv_heads, heads, kv_heads, kv_heads, heads)
            own = found[6 * i : 6 * i + 6]
            layers.append(
                SeenLayer(*(x.reshape(len(x), n, -1) for x, n in zip(own, counts, strict=True)))
            )
        return layers, logits

    def reader(self, layer: int) -> Floats | None:
        """The weight (n, heads * D) of the linear layer that reads a layer's results, as floats;
        None where something else does."""
        var = self._attentions[layer]
        readers = [v for v in self._values.values() if any(var.same_as(u) for u in variables(v))]
        if len(readers) == 1 and readers[0].op == ops.QUANTIZE_DEQUANTIZE:
            (var,) = (u for u, v in self._values.items() if v.same_as(readers[0]))
            readers = [
                v for v in self._values.values() if any(var.same_as(u) for u in variables(v))
            ]
        if len(readers) != 1 or readers[0].op != ops.LINEAR:
            return None
        attrs, named = readers[0].attrs, ops.operands(readers[0])
        arrays = {name: self._model.params[expr.name] for name, expr in named.items()}
        return dequantize(
            arrays["weight"], arrays.get("scales"), arrays.get("zero_points"),
            format=str(attrs["format"]), group_size=int(attrs["group_size"]),
            columns=int(attrs["k"]), group_channels=int(attrs.get("group_channels", 0)),
        )  # fmt: skip

    def moved(self, x: relax.Var, before: Floats, offset: int) -> Floats:
        """The heads ``before`` the rotation of ``x``, rotated as ``offset`` positions later."""
        rotation = self.rotation(x)
        assert rotation is not None
        cos, sin = (self._model.params[e.name][offset:] for e in rotation.args[1:])
        attrs = {name: rotation.attrs[name] for name in ("num_heads", "head_dim", "interleaved")}
        return attention.rope(attrs, before.reshape(len(before), -1), cos, sin).reshape(
            before.shape
        )

    def places(self, layer: int, seen: SeenLayer) -> Iterator[tuple[Floats, Floats]]:
        """Queries and keys of a layer as they are, or where they are rotated, as they would be at
        several places of the context: what has turned little in a window turns later."""
        q, k, _ = self.calls[layer].args[:3]
        if self.rotation(q) is None or self.rotation(k) is None:
            yield seen.q, seen.k
            return
        for offset in np.linspace(0, self._model.context - len(seen.q), _PLACES).astype(int):
            yield self.moved(q, seen.q_before, offset), self.moved(k, seen.k_before, offset)
