"""ONNX file to bundle: the stages, one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slmtvm.bundle import Bundle
from slmtvm.bundle.write import Checked, TextFiles, write_bundle
from slmtvm.early_exit import AGREEMENT, ChosenExit, choose_exits
from slmtvm.errors import SlmError, TargetError, UnsupportedTokenizerError
from slmtvm.host import runs_here
from slmtvm.importer import import_onnx
from slmtvm.ir.lowered import sparse_note
from slmtvm.ir.model import CanonicalModel
from slmtvm.low_rank import RankReport, low_rank, parse_kv
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.plan.setup import DEFAULT_SETUP
from slmtvm.planner import Planner, check_options
from slmtvm.runtime.selftest import record_selftest
from slmtvm.schedules import isa
from slmtvm.target import Target
from slmtvm.text import chat_pieces, compile_tokenizer, find_tokenizer, read_tokenizer
from slmtvm.tuning.choice import RecordedChoice, chosen_setup
from slmtvm.tuning.records import RecordLog, read_log
from slmtvm.tuning.shipped import shipped_records

if TYPE_CHECKING:
    from slmtvm.verify.cases import Tokens
    from slmtvm.verify.check import Check

Progress = Callable[[str], None]


def compile_model(
    model: str | Path,
    targets: Sequence[str | Target] = ("host",),
    *,
    output: str | Path,
    context: int | None = None,
    source_context: int | None = None,
    tokenizer: str | Path | None = None,
    kv: str | None = None,
    kv_calibration: str | Path | None = None,
    kv_keep: str = "window",
    activations: str = "int8",
    mask: str = "none",
    encoder: str | Path | None = None,
    outputs: Sequence[str] | None = None,
    sparse: str = "auto",
    exits: Sequence[str] = (),
    exit_calibration: str | Path | None = None,
    exit_agreement: float = AGREEMENT,
    check: bool = True,
    check_tokens: str | Path | Tokens | None = None,
    records: str | Path | None = None,
    cuda_persistent: bool = False,
    progress: Progress = lambda _: None,
    note: Progress = lambda _: None,
) -> Bundle:
    """Compile an ONNX file for one or more targets into the bundle ``output``.

    context: tokens that a session holds; the model's own maximum where None. source_context: the
    most tokens of an encoder-decoder's source. tokenizer: the one to put into the bundle, see
    ``slmtvm.text.read_tokenizer``; where None, the one beside the model, if there is one.
    kv: "f16", "f32", "int8" or "int4", how the KV cache holds keys and values; where None, what
    suits each target, or "f32" where some are known to be beyond float16. With "rank:R" or
    "rank:R,TYPE" it holds R features of each head, the projections of keys and values that the
    tokens of ``kv_calibration`` (a text, or ids in a .npy) need most, in that type; what this
    costs on them is the manifest's ``extra["kv_rank"]``.
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
    to compute with them, or a format of ``passes.lower_kernels.SPARSE`` for every layer that it
    fits, faster or not; results are the same bits. What became of each layer that has such zeros
    is the manifest's ``extra["sparse"]``.
    exits: where a decoded token may end before all layers, each a number of layers ("4": the
    model's own head reads what they made) or an output of the file whose logits come from there.
    Each ends tokens from a margin between the first two logits on, which is the least one at which,
    of the tokens of ``exit_calibration`` (a text, or ids in a .npy) that end there,
    ``exit_agreement`` have the same most likely next one after all layers. What came out is the
    manifest's ``extra["exits"]``. Prompts run all layers.
    check: compare what was made with onnxruntime on the file before it becomes the bundle; what
    came out is the manifest's ``extra["check"]``. For targets that this machine cannot run, a build
    for this machine is compared, whose bits are theirs.
    check_tokens: what to compare on, by default 64 tokens: half at random, half those with the
    largest embeddings. Ids (n,) or (windows, n), or a file: a text, or ids in a .npy.
    records: a file that ``slmtvm.tune`` wrote; where None, those that come with slmtvm (an empty
    file stands for no records). Kernels take the fastest knobs measured for their
    shape, or a near one, on the same target, those first that made a whole model faster, and none
    that did not; what they took is the manifest's ``extra["tuning"]``. Chunks and threads are those
    that were fastest for this model (``extra["setup"]``, where they are not the default). Results
    do not depend on it.
    cuda_persistent: on a GPU, a decoded token is one kernel that stays there from the first step to
    the last, where the GPU can hold it; the bits are the same.
    progress: called with the name of each step as it begins. note: called with each of the model's
    notes: what was left out, chosen or widened, and its cost. Raises SlmError, AccuracyError where
    the check fails; nothing is left at ``output`` then, and what was there before stays.
    """
    kv, rank = parse_kv(kv)
    check_options(kv, kv_keep, activations, sparse)
    resolved = with_fallbacks([t if isinstance(t, Target) else Target.load(t) for t in targets])
    if cuda_persistent:
        resolved = [target.with_persistent_kernel() for target in resolved]
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
    ranked: RankReport | None = None
    if rank:
        progress("low rank")
        windows = _calibration_windows(
            canonical, kv_calibration, tokenizer,
            "which features of keys and values a cache of lower rank keeps is learned from a text: "
            "name one with --kv-calibration",
        )  # fmt: skip
        canonical, ranked = low_rank(canonical, rank, windows)
        for line in ranked.lines():
            note(line)
    chosen: list[ChosenExit] = []
    if exits:
        progress("exits")
        canonical, chosen = _with_exits(
            canonical, resolved, exits, exit_calibration, exit_agreement, tokenizer, note
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
        records=read_log(records) if records is not None else None,
        exits=chosen,
        ranked=ranked,
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
    progress: Progress = lambda _: None,
    **options: Any,
) -> Plan:
    """What ``compile_model`` makes a library of: the plan of one target, with default knobs; the
    options are those of ``model_planner``."""
    planner = model_planner(model, progress=progress, **options)
    progress(f"kernels for {target.name}")
    return planner.plan(target)


def model_planner(
    model: str | Path,
    *,
    kv: str | None = None,
    kv_keep: str = "window",
    activations: str = "int8",
    sparse: str = "auto",
    progress: Progress = lambda _: None,
    **options: Any,
) -> Planner:
    """An ONNX file ready to be planned, as ``compile_model`` plans it.

    options: ``context``, ``source_context``, ``mask``, ``encoder`` and ``outputs``, as it takes
    them.
    """
    check_options(kv, kv_keep, activations, sparse)  # before the work that takes long
    progress("import")
    return Planner(
        import_onnx(model, **options),
        kv=kv, kv_keep=kv_keep, activations=activations, sparse=sparse, progress=progress,
    )  # fmt: skip


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
    records: RecordLog | None = None,
    exits: Sequence[ChosenExit] = (),
    ranked: RankReport | None = None,
    progress: Progress = lambda _: None,
    note: Progress = lambda _: None,
) -> Bundle:
    """``compile_model`` from what ``import_onnx`` and ``read_tokenizer`` gave."""
    check_options(kv, kv_keep, activations, sparse)
    shipped = records is None
    if records is None:
        records = shipped_records(targets)
    for text in model.notes:
        note(text)
    tables = _tokenizer_tables(tokenizer, note)
    net = _prepare_check(model, check_tokens, tokenizer, encoder) if check else None
    planner = Planner(
        model, kv=kv, kv_keep=kv_keep, activations=activations, sparse=sparse, progress=progress
    )
    plans: list[tuple[Target, Plan]] = []
    tuning: dict[str, Any] = {}
    setups: dict[str, Any] = {}
    skipping: dict[str, list[dict[str, object]]] = {}
    for target in targets:
        progress(f"kernels for {target.name}")
        choice = RecordedChoice(records, target)
        setup = chosen_setup(records.setups, planner.architecture, target)
        lowered = planner.lower(target, choice, setup)
        plans.append((target, build_plan(lowered, planner.info, setup)))
        if choice.used if shipped else records:
            tuning[target.name] = [
                {**chosen.to_json(), "shipped": shipped} for chosen in choice.used
            ]
        if setup != DEFAULT_SETUP:
            setups[target.name] = setup.to_json()
        if lowered.sparse:
            skipping[target.name] = [layer.facts() for layer in lowered.sparse]
            note(f"{target.name}: {sparse_note(lowered.sparse)}")

    def checked(folder: Path) -> Checked:
        assert net is not None
        selftests: dict[str, dict[str, Any]] = {}
        for dtype, name in _to_check(targets, model, planner.kv_dtype).items():
            progress("check")
            if name is not None:
                net.compare(folder, name)
                expected = record_selftest(folder, name)
            else:
                expected = _compare_host_build(net, planner, dtype, progress)
            if expected:
                held = {t.name: _cache_dtype(t, model, planner.kv_dtype) for t in targets}
                alike = (name for name, cache in held.items() if cache == dtype)
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
            **({"setup": setups} if setups else {}),
            **({"sparse": skipping} if skipping else {}),
            **({"exits": [asdict(chosen) for chosen in exits]} if exits else {}),
            **({"kv_rank": ranked.to_json()} if ranked else {}),
        },
        progress=progress,
    )


def _with_exits(
    model: CanonicalModel,
    targets: Sequence[Target],
    exits: Sequence[str],
    calibration: str | Path | None,
    agreement: float,
    tokenizer: str | Path | None,
    note: Progress,
) -> tuple[CanonicalModel, list[ChosenExit]]:
    gpus = [target.name for target in targets if target.cuda is not None]
    if gpus:
        raise TargetError(
            f"early exits are computed on CPUs: leave out {', '.join(gpus)}, or the exits"
        )
    windows = _calibration_windows(
        model, calibration, tokenizer,
        "what an exit is sure of is learned from a text: name one with --exit-calibration",
    )  # fmt: skip
    model, chosen, notes = choose_exits(model, exits, windows, agreement)
    for text in (*map(str, chosen), *notes):
        note(text)
    return model, chosen


def _calibration_windows(
    model: CanonicalModel,
    calibration: str | Path | None,
    tokenizer: str | Path | None,
    missing: str,
) -> list[npt.NDArray[np.int64]]:
    """What a calibration file has for a model, windows of equal length that fit its context; the
    error says what is ``missing`` where there is none."""
    if calibration is None:
        raise SlmError(missing, where=str(model.source))
    from slmtvm.quantize.calibration import read_tokens

    beside = Path(tokenizer) if tokenizer else find_tokenizer(model.source)
    windows = read_tokens(Path(calibration), beside)
    most = min(model.context, min(map(len, windows)))
    return [window[:most] for window in windows]


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
    planner: Planner,
    kv_dtype: str,
    progress: Progress,
) -> dict[str, Any] | None:
    try:
        host = Target.load("host")
    except TargetError as error:
        net.skip(str(error))
        return None
    with tempfile.TemporaryDirectory(prefix="slmtvm-check-") as folder:
        bundle = Path(folder) / "check.slm"
        plan = build_plan(planner.lower(host, kv_dtype=kv_dtype or None), planner.info)
        write_bundle(bundle, [(host, plan)], progress=progress)
        net.compare(bundle, host.name)
        return record_selftest(bundle, host.name)


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
    elif pieces is not None and pieces.names_tools and pieces.tools_reason is not None:
        note(f"the chat template is compiled without tools: {pieces.tools_reason}")
    return None if pieces is None else pieces.to_json()
