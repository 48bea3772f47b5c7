"""ONNX file to bundle: the stages, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmtvm.bundle import Bundle
from slmtvm.bundle.write import Checked, TextFiles, write_bundle
from slmtvm.errors import SlmError, TargetError, UnsupportedTokenizerError
from slmtvm.generation import generation_tokens
from slmtvm.host import runs_here
from slmtvm.importer import import_onnx
from slmtvm.ir.kv_range import beyond_half
from slmtvm.ir.lowered import sparse_note
from slmtvm.ir.model import CanonicalModel
from slmtvm.passes.lower_kernels import KEPT, SPARSE
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.passes.quantize_activations import ACTIVATIONS
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.runtime.selftest import record_selftest
from slmtvm.schedules import isa
from slmtvm.target import Target
from slmtvm.task import task_settings
from slmtvm.text import chat_pieces, compile_tokenizer, find_tokenizer, read_tokenizer
from slmtvm.tuning.choice import RecordedChoice
from slmtvm.tuning.records import Record, read_records

if TYPE_CHECKING:
    from slmtvm.verify.cases import Tokens
    from slmtvm.verify.check import Check

Progress = Callable[[str], None]
KV_DTYPES = {"f16": "float16", "f32": "float32", "int8": "int8", "int4": "int4"}


def compile_model(
    model: str | Path,
    targets: Sequence[str | Target] = ("host",),
    *,
    output: str | Path,
    context: int | None = None,
    source_context: int | None = None,
    tokenizer: str | Path | None = None,
    kv: str | None = None,
    kv_keep: str = "window",
    activations: str = "int8",
    mask: str = "none",
    encoder: str | Path | None = None,
    outputs: Sequence[str] | None = None,
    sparse: str = "auto",
    check: bool = True,
    check_tokens: str | Path | Tokens | None = None,
    records: str | Path | None = None,
    progress: Progress = lambda _: None,
    note: Progress = lambda _: None,
) -> Bundle:
    """Compile an ONNX file for one or more targets into the bundle ``output``.

    context: tokens that a session holds; the model's own maximum where None. source_context: the
    most tokens of an encoder-decoder's source. tokenizer: the one to put into the bundle, see
    ``slmtvm.text.read_tokenizer``; where None, the one beside the model, if there is one.
    kv: "f16", "f32", "int8" or "int4", how the KV cache holds keys and values; where None, what
    suits each target, or "f32" where some are known to be beyond float16.
    kv_keep: "window", so that layers which see a window of positions keep no more (``seek`` then
    goes back that far alone, see ``Session.seek``), or "all".
    activations: what float activations that meet integer weights are computed in: "int8" (they
    are rounded), "file" (rounded only where the file says so) or "f32" (never rounded).
    mask: "arbitrary" to run sequences of which any tokens are hidden, as the file's attention_mask
    has it; "none" takes no masks but those of an encoder's valid length. encoder: the ONNX file of
    the encoder whose hidden states the model reads; encoder_model.onnx beside it where None.
    outputs: names of the file's outputs to compile; where None all that hold floats for each token
    or for the whole sequence, but for the cache.
    sparse: "auto" to skip zeros of weights in the layers where that is expected to be faster, "off"
    to compute with them; results are the same bits. What became of each layer that has such zeros
    is the manifest's ``extra["sparse"]``.
    check: compare what was made with onnxruntime on the file before it becomes the bundle; what
    came out is the manifest's ``extra["check"]``. For targets that this machine cannot run, a build
    for this machine is compared, whose bits are theirs.
    check_tokens: what to compare on, by default 64 tokens: half at random, half those with the
    largest embeddings. Ids (n,) or (windows, n), or a file: a text, or ids in a .npy.
    records: a file that ``slmtvm.tune`` wrote. Kernels take the fastest knobs measured for their
    shape, or a near one, on the same target; what they took is the manifest's ``extra["tuning"]``.
    Results do not depend on it.
    progress: called with the name of each step as it begins. note: called with each of the model's
    notes: what was left out, chosen or widened, and its cost. Raises SlmError, AccuracyError where
    the check fails; nothing is left at ``output`` then, and what was there before stays.
    """
    _check_options(kv, kv_keep, activations, sparse)
    resolved = with_fallbacks([t if isinstance(t, Target) else Target.load(t) for t in targets])
    text = _tokenizer(model, tokenizer)  # before the work that takes long
    progress("import")
    canonical = import_onnx(
        model,
        context=context,
        source_context=source_context,
        mask=mask,
        encoder=encoder,
        outputs=outputs,
    )
    return compile_imported(
        canonical,
        resolved,
        output=output,
        tokenizer=text,
        kv=kv,
        kv_keep=kv_keep,
        activations=activations,
        encoder=encoder,
        sparse=sparse,
        check=check,
        check_tokens=check_tokens,
        records=read_records(records) if records is not None else (),
        progress=progress,
        note=note,
    )


def with_fallbacks(targets: Sequence[Target]) -> list[Target]:
    """``targets``, with those that run where the GPU of one is not there."""
    names = {target.name for target in targets}
    wanted = sorted({t.cuda.fallback for t in targets if t.cuda is not None} - names)
    return [*targets, *map(Target.load, wanted)]


def plan_model(
    model: str | Path,
    target: Target,
    *,
    kv: str | None = None,
    kv_keep: str = "window",
    activations: str = "int8",
    sparse: str = "auto",
    progress: Progress = lambda _: None,
    **options: Any,
) -> Plan:
    """What ``compile_model`` makes a library of: the plan of one target, with default knobs.

    options: ``context``, ``source_context``, ``mask``, ``encoder`` and ``outputs``, as it takes
    them.
    """
    _check_options(kv, kv_keep, activations, sparse)
    progress("import")
    canonical = import_onnx(model, **options)
    fused = fuse(canonical, progress, activations)
    info = _info(canonical, activations, kv, beyond_half(canonical))
    progress(f"kernels for {target.name}")
    return build_plan(lower(fused, target, _kv_dtype(info), sparse=sparse, keep=kv_keep), info)


def compile_imported(
    model: CanonicalModel,
    targets: Sequence[Target],
    *,
    output: str | Path,
    tokenizer: bytes | None = None,
    kv: str | None = None,
    kv_keep: str = "window",
    activations: str = "int8",
    encoder: str | Path | None = None,
    sparse: str = "auto",
    check: bool = True,
    check_tokens: str | Path | Tokens | None = None,
    records: Sequence[Record] = (),
    progress: Progress = lambda _: None,
    note: Progress = lambda _: None,
) -> Bundle:
    """``compile_model`` from what ``import_onnx`` and ``read_tokenizer`` gave."""
    _check_options(kv, kv_keep, activations, sparse)
    for text in model.notes:
        note(text)
    tables = _tokenizer_tables(tokenizer, note)
    net = _prepare_check(model, check_tokens, tokenizer, encoder) if check else None
    largest = beyond_half(model)
    fused = fuse(model, progress, activations)
    info = _info(model, activations, kv, largest)
    kv_dtype = _kv_dtype(info)
    plans: list[tuple[Target, Plan]] = []
    tuning: dict[str, Any] = {}
    skipping: dict[str, list[dict[str, object]]] = {}
    for target in targets:
        progress(f"kernels for {target.name}")
        choice = RecordedChoice(records, target)
        lowered = lower(fused, target, kv_dtype, choice, sparse, kv_keep)
        plans.append((target, build_plan(lowered, info)))
        if records:
            tuning[target.name] = [chosen.to_json() for chosen in choice.used]
        if lowered.sparse:
            skipping[target.name] = [layer.facts() for layer in lowered.sparse]
            note(f"{target.name}: {sparse_note(lowered.sparse)}")

    def checked(folder: Path) -> Checked:
        assert net is not None
        selftests: dict[str, dict[str, Any]] = {}
        for dtype, name in _to_check(targets, model, kv_dtype).items():
            progress("check")
            if name is not None:
                net.compare(folder, name)
                expected = record_selftest(folder, name)
            else:
                expected = _compare_host_build(net, fused, dtype, info, sparse, kv_keep, progress)
            if expected:
                alike = (t.name for t in targets if _cache_dtype(t, model, kv_dtype) == dtype)
                selftests.update(dict.fromkeys(alike, expected))
        return Checked(net.record, selftests)

    progress("bundle")
    return write_bundle(
        output,
        plans,
        source=model.source,
        text=TextFiles(tokenizer, tables, _chat(model.source, tables, note)),
        check=checked if check else None,
        extra={
            **({"tuning": tuning} if tuning else {}),
            **({"sparse": skipping} if skipping else {}),
        },
        progress=progress,
    )


def _kv_dtype(info: dict[str, object]) -> str | None:
    """How the KV cache is held where the user or the model says, else None."""
    return KV_DTYPES[str(info["kv"])] if info["kv"] != "default" else None


def _prepare_check(
    model: CanonicalModel,
    tokens: str | Path | Tokens | None,
    tokenizer: bytes | None,
    encoder: str | Path | None,
) -> Check:
    from slmtvm.verify.check import prepare_check  # onnxruntime is not needed without it

    return prepare_check(model, tokens, tokenizer, encoder)


def _to_check(
    targets: Sequence[Target], model: CanonicalModel, kv_dtype: str | None
) -> dict[str, str | None]:
    """Each type of KV cache that there is, and a target with it that this machine runs, if any.

    With the same type all targets compute the same bits.
    """
    found: dict[str, str | None] = {}
    for target in sorted(targets, key=lambda t: (len(t.requires), t.name)):
        dtype = _cache_dtype(target, model, kv_dtype)
        found.setdefault(dtype, None)
        if target.cuda is None and runs_here(target.arch, target.requires):
            found[dtype] = target.name
    return found


def _cache_dtype(target: Target, model: CanonicalModel, kv_dtype: str | None) -> str:
    """The type of a target's KV cache; "" for an encoder, which has none."""
    return "" if model.kind == "encoder" else kv_dtype or isa.get(target.isa).kv_dtype


def _compare_host_build(
    net: Check,
    fused: CanonicalModel,
    kv_dtype: str,
    info: dict[str, object],
    sparse: str,
    kv_keep: str,
    progress: Progress,
) -> dict[str, Any] | None:
    try:
        host = Target.load("host")
    except TargetError as error:
        net.skip(str(error))
        return None
    with tempfile.TemporaryDirectory(prefix="slmtvm-check-") as folder:
        bundle = Path(folder) / "check.slm"
        plan = build_plan(lower(fused, host, kv_dtype or None, sparse=sparse, keep=kv_keep), info)
        write_bundle(bundle, [(host, plan)], progress=progress)
        net.compare(bundle, host.name)
        return record_selftest(bundle, host.name)


def _check_options(kv: str | None, kv_keep: str, activations: str, sparse: str) -> None:
    if kv_keep not in KEPT:
        raise SlmError(f"must be one of {', '.join(KEPT)}, not {kv_keep!r}", where="kv_keep")
    if kv is not None and kv not in KV_DTYPES:
        raise SlmError(f"must be one of {', '.join(KV_DTYPES)}, not {kv!r}", where="kv")
    if activations not in ACTIVATIONS:
        message = f"must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
        raise SlmError(message, where="activations")
    if sparse not in SPARSE:
        raise SlmError(f"must be one of {', '.join(SPARSE)}, not {sparse!r}", where="sparse")


def _tokenizer(model: str | Path, given: str | Path | None) -> bytes | None:
    path = find_tokenizer(model) if given is None else given
    return None if path is None else read_tokenizer(path)


def _tokenizer_tables(tokenizer: bytes | None, note: Progress) -> bytes | None:
    """The tokenizer compiled for devices; None, with a note, where that cannot be."""
    if tokenizer is None:
        return None
    try:
        return compile_tokenizer(tokenizer)
    except UnsupportedTokenizerError as error:
        note(
            f"the tokenizer cannot be compiled for devices: {error}; there the bundle takes token "
            "ids only, in Python text too"
        )
        return None


def _chat(model: Path, tables: bytes | None, note: Progress) -> bytes | None:
    """chat.json of the chat template beside the model, if there is one."""
    if tables is None:
        return None
    pieces = chat_pieces(model)
    if pieces is not None and pieces.reason is not None:
        note(f"the chat template cannot be compiled for devices: {pieces.reason}")
    return None if pieces is None else pieces.to_json()


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
        "exact_from": model.exact_from,
        "left_out": dict(model.left_out),  # outputs of the file, and why
        "padding": list(model.padding),
        "final_token": model.final_token,
        "start": tokens.start,
        "end": list(tokens.end),
        "task": task_settings(model.source, [o.name for o in model.outputs]).to_dict(),
    }
