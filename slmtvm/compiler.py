"""ONNX file to bundle: the stages, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from slmtvm.bundle import Bundle
from slmtvm.bundle.write import write_bundle
from slmtvm.errors import SlmError
from slmtvm.generation import generation_tokens
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.passes.quantize_activations import ACTIVATIONS
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.target import Target
from slmtvm.task import task_settings

Progress = Callable[[str], None]
KV_DTYPES = {"f16": "float16", "f32": "float32", "int8": "int8"}


def compile_model(
    model: str | Path,
    targets: Sequence[str | Target] = ("host",),
    *,
    output: str | Path,
    context: int | None = None,
    source_context: int | None = None,
    tokenizer: str | Path | None = None,
    kv: str | None = None,
    activations: str = "int8",
    mask: str = "none",
    outputs: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Compile an ONNX file for one or more targets into the bundle ``output``.

    context: tokens that a session holds; the model's own maximum where None. source_context: the
    most tokens of an encoder-decoder's source. tokenizer: a tokenizer.json to put into the bundle;
    the one beside the model where None and there is one.
    kv: "f16", "f32" or "int8", how the KV cache holds keys and values; what suits each target where
    None.
    activations: what float activations that meet integer weights are computed in: "int8" (they
    are rounded), "file" (rounded only where the file says so) or "f32" (never rounded).
    mask: "arbitrary" to run sequences of which any tokens are hidden, as the file's attention_mask
    has it; "none" takes no masks but those of an encoder's valid length.
    outputs: names of the file's outputs to compile; where None all that hold floats for each token
    or for the whole sequence, but for the cache.
    progress: called with the name of each step as it begins. Raises SlmError; nothing is left at
    ``output`` then, and what was there before stays.
    """
    _check_options(kv, activations)
    resolved = [t if isinstance(t, Target) else Target.load(t) for t in targets]
    progress("import")
    canonical = import_onnx(
        model, context=context, source_context=source_context, mask=mask, outputs=outputs
    )
    return compile_imported(
        canonical,
        resolved,
        output=output,
        tokenizer=tokenizer,
        kv=kv,
        activations=activations,
        progress=progress,
    )


def compile_imported(
    model: CanonicalModel,
    targets: Sequence[Target],
    *,
    output: str | Path,
    tokenizer: str | Path | None = None,
    kv: str | None = None,
    activations: str = "int8",
    progress: Progress = lambda _: None,
) -> Bundle:
    """``compile_model`` from what ``import_onnx`` gave."""
    _check_options(kv, activations)
    fused = fuse(model, progress, activations)
    info = _info(model, activations, kv)
    plans: list[tuple[Target, Plan]] = []
    for target in targets:
        progress(f"kernels for {target.name}")
        kv_dtype = None if kv is None else KV_DTYPES[kv]
        plans.append((target, build_plan(lower(fused, target, kv_dtype), info)))
    progress("bundle")
    tokenizer = _tokenizer(model.source, tokenizer)
    return write_bundle(output, plans, source=model.source, tokenizer=tokenizer, progress=progress)


def _check_options(kv: str | None, activations: str) -> None:
    if kv is not None and kv not in KV_DTYPES:
        raise SlmError(f"must be one of {', '.join(KV_DTYPES)}, not {kv!r}", where="kv")
    if activations not in ACTIVATIONS:
        message = f"must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
        raise SlmError(message, where="activations")


def _tokenizer(model: str | Path, given: str | Path | None) -> Path | None:
    if given is not None:
        return Path(given)
    beside = Path(model).parent / "tokenizer.json"
    return beside if beside.is_file() else None


def _info(model: CanonicalModel, activations: str, kv: str | None) -> dict[str, object]:
    """What slm_info and the manifest say of the model."""
    tokens = generation_tokens(model.source, model.vocab_size)
    rounded = model.float_activation_layers if activations == "int8" else 0
    return {
        "activations": activations,
        "kv": kv or "default",
        "rounded_layers": rounded,  # whose activations are rounded where the file does not
        "kind": model.kind,
        "family": model.family,
        "layers": len(model.kv),
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv[0].num_kv_heads if model.kv else 0,
        "head_dim": model.kv[0].head_dim if model.kv else 0,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "context": model.context,
        "left_out": dict(model.left_out),  # outputs of the file, and why
        "padding": list(model.padding),
        "start": tokens.start,
        "end": list(tokens.end),
        "task": task_settings(model.source).to_dict(),
    }
