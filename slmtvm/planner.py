"""An imported model, ready to be planned for any target, with any knobs, divided in any way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

from slmtvm.errors import SlmError
from slmtvm.generation import generation_tokens
from slmtvm.ir.kv_range import beyond_half
from slmtvm.ir.lowered import LoweredModel
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels import KEPT, SPARSE
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.passes.quantize_activations import ACTIVATIONS
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.plan.setup import DEFAULT_SETUP, Setup
from slmtvm.schedules.templates import KnobChoice, default_choice
from slmtvm.target import Target
from slmtvm.task import task_settings

KV_DTYPES = {"f16": "float16", "f32": "float32", "int8": "int8", "int4": "int4"}


class Planner:
    """Plans of one model. ``info`` is what slm_info and the manifest say of it."""

    def __init__(
        self,
        model: CanonicalModel,
        *,
        kv: str | None = None,
        kv_keep: str = "window",
        activations: str = "int8",
        sparse: str = "auto",
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """The others are as ``slmtvm.compile`` takes them; raises SlmError where they are none of
        what it takes."""
        check_options(kv, kv_keep, activations, sparse)
        self.model, self._sparse, self._activations = model, sparse, activations
        self._kv_keep = kv_keep
        self._progress = progress
        self.info = _info(model, activations, kv, beyond_half(model))
        stated = str(self.info["kv"])
        self.kv_dtype = KV_DTYPES[stated] if stated != "default" else None
        """How the KV cache is held where the user or the model says, else None."""
        self._fused: dict[tuple[int, ...], CanonicalModel] = {}

    def lower(
        self,
        target: Target,
        choose: KnobChoice = default_choice,
        setup: Setup = DEFAULT_SETUP,
        kv_dtype: str | None = None,
    ) -> LoweredModel:
        """The model as calls of the target's kernels; ``kv_dtype`` instead of the model's own."""
        chunks = setup.chunks
        if chunks not in self._fused:
            self._fused[chunks] = fuse(self.model, self._progress, self._activations, chunks)
        held = kv_dtype or self.kv_dtype
        return lower(self._fused[chunks], target, held, choose, self._sparse, self._kv_keep)

    def plan(
        self, target: Target, choose: KnobChoice = default_choice, setup: Setup = DEFAULT_SETUP
    ) -> Plan:  # fmt: skip
        """What a library is made of."""
        return build_plan(self.lower(target, choose, setup), self.info, setup)

    @property
    def architecture(self) -> str:
        """A short digest, equal for models of the same layers: their weights may differ."""
        facts = {name: self.info[name] for name in _ARCHITECTURE}
        weights = sorted((str(v.dtype), list(v.shape)) for v in self.model.params.values())
        text = json.dumps([facts, weights], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_ARCHITECTURE = (
    "activations", "kind", "family", "layers", "num_heads", "num_kv_heads", "head_dim",
    "hidden_size", "vocab_size",
)  # fmt: skip


def check_options(kv: str | None, kv_keep: str, activations: str, sparse: str) -> None:
    """Raises SlmError where an option of a compile is none of what it may be."""
    if kv_keep not in KEPT:
        raise SlmError(f"must be one of {', '.join(KEPT)}, not {kv_keep!r}", where="kv_keep")
    if kv is not None and kv not in KV_DTYPES:
        raise SlmError(f"must be one of {', '.join(KV_DTYPES)}, not {kv!r}", where="kv")
    if activations not in ACTIVATIONS:
        message = f"must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
        raise SlmError(message, where="activations")
    if sparse not in SPARSE:
        raise SlmError(f"must be one of {', '.join(SPARSE)}, not {sparse!r}", where="sparse")


def _ranks(model: CanonicalModel) -> list[int]:
    return [s.head_dim for s in model.kv] if any(s.whole for s in model.kv) else []


def _info(
    model: CanonicalModel, activations: str, kv: str | None, largest: float
) -> dict[str, object]:
    """What slm_info and the manifest say of the model; ``largest`` as ``beyond_half`` has it."""
    tokens = generation_tokens(model.source, model.vocab_size)
    rounded = model.float_activation_layers if activations == "int8" else 0
    return {
        "activations": activations,
        "kv": kv or ("f32" if largest else "default"),
        "kv_beyond_f16": bool(largest),
        "kv_ranks": _ranks(model),  # features of a head that each layer keeps, if some keep fewer
        "rounded_layers": rounded,  # whose activations are rounded where the file does not
        "kind": model.kind,
        "family": model.family,
        "layers": len(model.kv),
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv[0].num_kv_heads if model.kv else 0,
        "head_dim": (model.kv[0].whole or model.kv[0].head_dim) if model.kv else 0,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "context": model.context,
        "exact_from": model.exact_from,
        "left_out": dict(model.left_out),  # outputs of the file, and why
        "padding": list(model.padding),
        "final_token": model.final_token,
        "exits": [asdict(exit_) for exit_ in model.exits],
        "start": tokens.start,
        "end": list(tokens.end),
        "task": task_settings(model.source, [o.name for o in model.outputs]).to_dict(),
    }
