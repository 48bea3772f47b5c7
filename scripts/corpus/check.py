"""One file of the corpus through the whole chain: import, reference, compile, run, speed.

A task head is compiled for masks where its file has any, and run with padding on either side of the
sentence as well. A pruned model is compiled once more, with every zero skipped that kernels can
skip, expected to gain or not: its layers are too small for that.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tvm_ffi import structural_hash

from corpus.agreement import Agreement, compare, rule_of
from corpus.inputs import ended, source_of, token_sequences
from corpus.oracle import wanted_rows
from corpus.outputs import our_rows, side_by_side
from corpus.padding import PaddedSentences
from corpus.selection import is_pruned, split_name
from corpus.stability import optimized_reference, own_difference
from slmtvm.bundle import Bundle
from slmtvm.compiler import compile_imported
from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx, import_with_mask
from slmtvm.ir.model import CanonicalModel, Output
from slmtvm.ir.params import Params
from slmtvm.passes.lower_kernels import sparse
from slmtvm.runtime import Session, load
from slmtvm.target import Target
from slmtvm.verify import verify

STAGES = ("import", "evaluate", "compile", "time", "default")
CONTEXT = 61  # positions compiled for
SPEED_TOKENS = 48
SPEED_ROUNDS = 9
_SAME = 1.01  # times a difference: the same rounding turned, by other floats around it


@dataclass
class Outcome:
    """What became of a file. ``stage`` is the last that was reached, ``error`` what ended it."""

    file: str
    last: str = ""  # the stage that it was to reach
    stage: str = ""
    error: str = ""
    rule: str = ""
    family: str = ""
    notes: tuple[str, ...] = ()
    evaluated: dict[str, float | None] = field(
        default_factory=dict
    )  # numpy reference: difference, ...
    compiled: dict[str, float | None] = field(default_factory=dict)  # the bundle: the same
    # Of a task head, the same for sentences with padding: "left" and "right", what its file takes;
    # None where onnxruntime sees the padding.
    padded: dict[str, dict[str, float | None] | None] = field(default_factory=dict)
    # Of a pruned model, how many layers were compiled for each kernel that skips zeros.
    skipping: dict[str, int] = field(default_factory=dict)
    # onnxruntime's difference from its own, where ours is greater than ``most`` or breaks the rule.
    own: float = 0.0
    held: bool = True  # whether the rule was kept; an error too where ours is greater than ``own``
    speed: float = 0.0  # onnxruntime's seconds over the bundle's
    # What verify says of a compile without options, whose activations are int8.
    default: dict[str, float | None] = field(default_factory=dict)
    weight_bytes: int = 0
    file_bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(path: Path, bundles: Path, last: str = STAGES[-1]) -> Outcome:
    """Take a file as far as ``last``; an error or a broken rule ends it, and is in the outcome.

    ``bundles``: a folder for what is compiled; files that are the same model share a bundle.
    """
    outcome = Outcome(str(path), last, file_bytes=_bytes(path))
    begin = time.perf_counter()
    try:
        _run(path, bundles, outcome, last)
    except Exception as error:
        words = " ".join(str(error).split())
        outcome.error = words if isinstance(error, SlmError) else f"{type(error).__name__}: {words}"
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _run(path: Path, bundles: Path, outcome: Outcome, last: str) -> None:
    is_head = bool(split_name(path.parent.name).head)
    model = (import_with_mask if is_head else _import_without_mask)(path, context=CONTEXT)[0]
    outcome.stage, outcome.family, outcome.notes = "import", model.family, model.notes
    outcome.weight_bytes = Params(model.params).nbytes
    if last == "import":
        return
    rule = rule_of(path)
    outcome.rule = rule.name
    sequences = [
        ended(tokens, model.final_token)
        for tokens in token_sequences(model.vocab_size, rule.lengths)
    ]
    source = source_of(model.kind)
    wanted = wanted_rows(path, sequences, source, model.outputs, stepwise=rule.stepwise)
    ours = [our_rows(model, tokens) for tokens in sequences]
    scores_last = model.kind == "decoder" and all(output.pooled for output in model.outputs)
    own = cache(partial(own_difference, path, sequences, source, model.outputs, rule, scores_last))
    outcome.evaluated = judge(compare(rule, ours, wanted, model.outputs), own, outcome)
    outcome.stage = "evaluate"
    if last == "evaluate":
        return
    # As the file says it, nothing rounded that it does not round.
    bundle = _compiled(model, bundles, kv="f32", activations="file")
    with load(bundle) as session:
        ours = [session_rows(session, model.outputs, tokens) for tokens in sequences]
        outcome.compiled = judge(compare(rule, ours, wanted, model.outputs), own, outcome)
        if is_pruned(path.parent.name):
            outcome.skipping = _without_zeros(model, bundles, sequences, ours)
        if is_head:
            sentences = PaddedSentences(path, model, rule, sequences)
            for side in sentences.sides:
                agreement = sentences.compare(session, side)
                outcome.padded[side] = agreement and judge(agreement, own, outcome)
        outcome.stage = "compile"
        if last == "compile":
            return
        outcome.speed = _speed(path, session, model)
    outcome.stage = "time"
    if last == "time" or not (model.float_activation_layers or _is_usual(path)):
        return
    bundle = _compiled(model, bundles)
    outcome.default = verify(bundle, path).to_json()
    outcome.stage = "default"


def _without_zeros(
    model: CanonicalModel, bundles: Path, sequences: Sequence[np.ndarray], dense: list[np.ndarray]
) -> dict[str, int]:
    """How many layers skip zeros, by kernel, with every zero skipped that can be.

    Raises ArithmeticError where rows of the ``sequences`` are not to the bit those of ``dense``.
    """
    bundle = _compiled(model, bundles, skipping=True, kv="f32", activations="file")
    with load(bundle) as session:
        for tokens, expected in zip(sequences, dense, strict=True):
            if not np.array_equal(session_rows(session, model.outputs, tokens), expected):
                raise ArithmeticError("skipping zeros changes results")
    (layers,) = Bundle.open(bundle).manifest.extra.get("sparse", {"": []}).values()
    return dict(Counter(layer["kernel"] for layer in layers))


@contextmanager
def _every_zero_skipped() -> Iterator[None]:
    limit, sparse.LIMIT = sparse.LIMIT, float("inf")
    try:
        yield
    finally:
        sparse.LIMIT = limit


def _import_without_mask(path: Path, *, context: int) -> tuple[CanonicalModel, str]:
    return import_onnx(path, context=context), ""


def _compiled(
    model: CanonicalModel, bundles: Path, *, skipping: bool = False, **options: str
) -> Path:
    """The bundle of a model, compiled unless an equal one was: exporters spell one model in many
    ways."""
    digest = hashlib.sha256()
    rest = (
        model.outputs,
        model.padding,
        model.mask,
        model.float_activation_layers,
        sorted(options.items()),
        skipping,
    )
    digest.update(repr((structural_hash(model.module), *rest)).encode())
    for value in model.params.values():
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    bundle = bundles / f"{digest.hexdigest()}.slm"
    if not bundle.exists():
        with _every_zero_skipped() if skipping else nullcontext():
            compile_imported(model, [Target.load("host")], output=bundle, check=False, **options)
    return bundle


def _is_usual(path: Path) -> bool:
    """Whether it is a float model as most people export it."""
    cell = split_name(path.parent.name)
    return cell.route.startswith(("optimum", "script-embedding")) and not cell.transform


def session_rows(session: Session, outputs: Sequence[Output], tokens: np.ndarray) -> np.ndarray:
    """All rows of a sequence; a decoder takes its second half token by token."""
    kind = session.info["kind"]
    if kind == "encoder":
        return side_by_side(outputs, [*session.outputs(tokens).values()], len(tokens))
    session.reset()
    if len(outputs) > 1 or outputs[0].pooled:
        return _rows_by_token(session, outputs, tokens)
    if (source := source_of(kind)) is not None:
        session.encode(source)
    half = -(-len(tokens) // 2)
    rows = [session.eval_all(tokens[:half])]
    rows += [session.eval_all(tokens[i : i + 1]) for i in range(half, len(tokens))]
    return np.concatenate(rows)


def _rows_by_token(session: Session, outputs: Sequence[Output], tokens: np.ndarray) -> np.ndarray:
    """All outputs of a decoder, which gives them after the last token of a call."""
    found = [session.outputs([token]) for token in tokens]
    values = [
        found[-1][o.name] if o.pooled else np.stack([rows[o.name] for rows in found])
        for o in outputs
    ]
    return side_by_side(outputs, values, len(tokens))


def judge(
    agreement: Agreement, own: Callable[[], float], outcome: Outcome
) -> dict[str, float | None]:
    """The numbers of an agreement; ``outcome`` is told where it breaks its rule.

    ``own``: onnxruntime's difference from itself. Raises where ours is greater and breaks the rule.
    """
    most = agreement.rule.most
    turned = not agreement.holds or (most is not None and agreement.difference > most)
    least = own() if turned else 0.0
    outcome.held &= agreement.holds
    outcome.own = max(outcome.own, least)
    if not agreement.holds and not agreement.difference <= least * _SAME:  # NaN is none
        raise SlmError(f"differs from onnxruntime: {agreement}; it from itself: {least:.2g}")
    numbers = asdict(agreement)
    del numbers["rule"]
    return numbers


def _speed(path: Path, session: Session, model: CanonicalModel) -> float:
    """onnxruntime's time for a prompt over ours, on one thread, its graph optimized; 0 where
    onnxruntime does not run the file so."""
    if (reference := optimized_reference(path)) is None:
        return 0.0
    kind = model.kind
    (tokens,) = token_sequences(model.vocab_size, (SPEED_TOKENS,))
    tokens = ended(tokens, model.final_token)
    run = session.encode if kind == "encoder" else session.eval
    names = [output.name for output in model.outputs]
    source = source_of(kind)
    if source is not None:
        session.encode(source)
    ours, theirs = [], []
    for _ in range(SPEED_ROUNDS):
        if kind != "encoder":
            session.reset()
        begin = time.perf_counter()
        run(tokens)
        middle = time.perf_counter()
        reference.run(tokens, names, source)
        ours.append(middle - begin)
        theirs.append(time.perf_counter() - middle)
    return float(np.median(theirs) / np.median(ours))


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
