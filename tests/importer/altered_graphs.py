"""What becomes of altered graphs: right, refused, or neither.

Each is imported, and its ops are compared with onnxruntime on the same file. What onnxruntime does
not run, or gives no finite numbers for, says nothing.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from corpus.agreement import BLOCKS, EXACT, HALF, Rule, compare, rule_of
from corpus.check import session_rows
from corpus.inputs import source_of
from corpus.outputs import our_rows, their_rows
from onnx import TensorProto, helper, numpy_helper

from slmtvm.compiler import compile_imported
from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel, Output
from slmtvm.runtime import load
from slmtvm.target import Target
from slmtvm.verify import Reference
from tests.importer.alterations import alter
from tests.importer.graphs import Tiny, build
from tests.importer.recognise.experts.test_experts import (
    gathered_matrices,
    loop_over_experts,
    one_operator,
)
from tests.importer.test_builder_graphs import Built, write
from tests.models.corpus import corpus_path
from tests.models.quantizers import quantize_int4

CONTEXT = 48
_LENGTHS = (1, 23)  # of the sequences that are compared
_OBSERVED = 11  # tokens of the sequence whose values show where bounds may lie
_DRAWS = 6  # of last bits, for how far onnxruntime is from itself
_TIMES = 8.0  # that difference: as far as ours may be


def _int4() -> onnx.ModelProto:
    return quantize_int4(build(Tiny(hidden=32, ffn=40, rope="interleaved", mask="sliced")))


TINY: dict[str, Callable[[], onnx.ModelProto]] = {
    "rotated": partial(build, Tiny(rope="rotate_half", heads=4, kv_heads=2, layers=2)),
    "interleaved": partial(build, Tiny(rope="interleaved", norm="rms_divide", mask="where")),
    "partial": partial(build, Tiny(rope="partial", norm="layer_spelled", packed_qkv="heads")),
    "split": partial(build, Tiny(rope="split_halves", norm="rms_power", packed_qkv="parts")),
    "normed heads": partial(build, Tiny(rope="rotate_half", qk_norm="own", scale_on="both")),
    "learned": partial(build, Tiny(norm="layer_operator", learned_positions=64, bias=True,
                                   activation="gelu_tanh")),
    "encoder": partial(build, Tiny(norm="layer_without_beta", mask="none", learned_positions=50,
                                   activation="gelu_erf", bias=True)),
    "capped": partial(build, Tiny(softcap=3.0, mask="window", activation="silu_divided")),
    "biased": partial(build, Tiny(mask="by_distance", activation="relu", scale_on="queries")),
    "by key": partial(build, Tiny(mask="by_key", activation="quick_gelu", norm="rms_operator")),
    "tied": partial(build, Tiny(tied=True, activation="hard_swish", mask="both_ways")),
    "int4": _int4,
    "gathered experts": partial(build, Tiny(block=gathered_matrices)),
    "loop over experts": partial(build, Tiny(block=loop_over_experts)),
    "one operator of experts": partial(build, Tiny(block=one_operator)),
    "whole layers": partial(write, Built(layers=1, accuracy_level=4)),
    "rotary operators": partial(write, Built(layers=1, rotary="heads", bias=True,
                                             skip="SkipLayerNormalization", skip_bias=True)),
}  # fmt: skip
"""Graphs that are written node by node, by what is special about them."""

CORPUS = (
    "bart-dynamo", "bert-optimum", "bert-script-masked-fused", "bert-optimum-qdq-u8s8",
    "bert-optimum-fp16", "bloom-dynamo", "distilbert-dynamo", "flan-t5-dynamo",
    "gemma2-optimum-past", "gemma3-dynamo", "gpt-neox-dynamo", "gpt-neox-optimum1.23",
    "gpt2-dynamo", "gpt2-script-masked-fused", "lfm2-moe-builder-fp32", "llama-builder-int4",
    "llama-builder-fp32", "llama-dynamo", "llama-optimum-past", "llama-optimum-past-int4-qdq",
    "llama-optimum-past-int4-block32-zp", "minilm-script", "mistral-dynamo",
    "mixtral-script-masked", "mpnet-dynamo", "opt-optimum-past", "phi3-optimum-past",
    "qwen2-builder-int4", "qwen2-optimum-past", "qwen2-moe-script-masked", "qwen3-dynamo",
    "qwen3-builder-fp32", "roberta-dynamo", "t5-dynamo", "tinybert-dynamo",
)  # fmt: skip
"""Cells of the corpus: every family, and most routes and quantizations."""

BASES = (*TINY, *CORPUS)


@dataclass(frozen=True)
class Verdict:
    """How it ended: "agrees", "refused", "unusable" (by onnxruntime), "wrong" or "crash"; ``says``
    the numbers or the message."""

    base: str
    alteration: str
    ending: str
    says: str = ""

    @property
    def good(self) -> bool:
        return self.ending in ("agrees", "refused", "unusable")

    def __str__(self) -> str:
        return f"{self.ending}: {self.base}: {self.alteration}: {self.says}"


@dataclass
class Tally:
    """The verdicts of many graphs."""

    endings: Counter[str] = field(default_factory=Counter)
    bad: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.endings[verdict.ending] += 1
        if not verdict.good:
            self.bad.append(verdict)


def altered_graphs(
    bases: tuple[str, ...],
    count: int,
    seed: int,
    folder: Path,
    *,
    keep: Path | None = None,
    compiled: bool = False,
) -> Iterator[Verdict]:
    """The verdicts on ``count`` graphs, from ``bases`` in turn, fixed by ``seed``.

    ``keep``: where the files of bad ones go. ``compiled``: compile them for this machine, where
    otherwise their ops are computed with numpy.
    """
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        base = bases[index % len(bases)]
        model, alteration = alter(_model(base), _values(base, folder), rng)
        path = folder / "altered.onnx"
        onnx.save(model, path)
        verdict = judge(path, base, alteration, folder if compiled else None)
        if keep is not None and not verdict.good:
            keep.mkdir(parents=True, exist_ok=True)
            onnx.save(model, keep / f"{seed}-{index}.onnx")
        yield verdict


def judge(path: Path, base: str, alteration: str, bundles: Path | None = None) -> Verdict:
    """The verdict on one file; with ``bundles`` it is compiled there."""
    rule = _rule(path)
    sequences = _sequences(_vocab(base))
    try:
        whole = np.concatenate(_rows(path, sequences))
    except SlmError as error:
        return Verdict(base, alteration, "unusable", str(error))
    if not np.isfinite(whole).all() or np.ptp(whole) <= 1e-3 * np.abs(whole).max():
        return Verdict(base, alteration, "unusable", "no numbers to compare")
    try:
        model = import_onnx(path, context=CONTEXT)
        ours = _results(model, sequences, bundles)
    except SlmError as error:
        return Verdict(base, alteration, "refused", str(error))
    except Exception:
        return Verdict(base, alteration, "crash", traceback.format_exc(limit=-3))
    wanted = _rows(path, sequences, model.outputs)
    if ours[0].shape != wanted[0].shape:
        says = f"rows of {ours[0].shape}, onnxruntime's {wanted[0].shape}"
        return Verdict(base, alteration, "wrong", says)
    if not all(np.isfinite(rows).all() for rows in wanted):
        return Verdict(base, alteration, "unusable", "no numbers in another output")
    finite = all(np.isfinite(rows).all() for rows in ours)
    if not finite and _has_no_number(path, sequences[-1]):
        return Verdict(base, alteration, "unusable", "NaN on the way")
    agreement = compare(rule, ours, wanted)
    if agreement.holds:
        return Verdict(base, alteration, "agrees", str(agreement))
    own = _own_difference(path, sequences, model.outputs, wanted)
    near = agreement.difference <= _TIMES * own
    says = f"{agreement}; onnxruntime from itself {own:.2g}"
    return Verdict(base, alteration, "agrees" if near else "wrong", says)


def _rule(path: Path) -> Rule:
    """The corpus's; casts to float16 go, so that a file with one is as far off as its rounding."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    casts = [a.i for n in nodes if n.op_type == "Cast" for a in n.attribute]
    rule = rule_of(path)
    return HALF if rule in (EXACT, BLOCKS) and TensorProto.FLOAT16 in casts else rule


def _results(
    model: CanonicalModel, sequences: list[np.ndarray], bundles: Path | None
) -> list[np.ndarray]:
    if bundles is None:
        with np.errstate(all="ignore"):
            return [our_rows(model, tokens) for tokens in sequences]
    with TemporaryDirectory(dir=bundles) as folder:
        bundle, host = Path(folder) / "altered.slm", Target.load("host")
        compile_imported(model, [host], output=bundle, kv="f32", activations="file", check=False)
        with load(bundle) as session:
            return [session_rows(session, model.outputs, tokens) for tokens in sequences]


def _rows(
    path: Path, sequences: list[np.ndarray], outputs: tuple[Output, ...] = (), **options: bool
) -> list[np.ndarray]:
    """onnxruntime's, of these outputs side by side; without any of the main one."""
    reference, source = Reference(path, **options), _source(path)
    if not outputs:
        return [reference.rows(tokens, source) for tokens in sequences]
    return [their_rows(reference, tokens, source, outputs) for tokens in sequences]


def _source(path: Path) -> np.ndarray | None:
    """The tokens that the encoder reads in a file that has one beside its decoder."""
    inputs = onnx.load(path, load_external_data=False).graph.input
    both = any(port.name == "decoder_input_ids" for port in inputs)
    return source_of("encoder-decoder") if both else None


def _own_difference(
    path: Path,
    sequences: list[np.ndarray],
    outputs: tuple[Output, ...],
    wanted: list[np.ndarray],
) -> float:
    """The largest difference, of the results' range, between onnxruntime on the file, and with the
    graph optimized or last bits of its numbers changed."""
    whole, generator = np.concatenate(wanted), np.random.default_rng(0)
    others = []
    with suppress(SlmError):  # its optimizer does not take every graph that it runs
        others.append(_rows(path, sequences, outputs, optimize=True))
    for _ in range(_DRAWS):
        near = path.with_name("near.onnx")
        onnx.save(_with_other_bits(onnx.load(path), generator), near)
        others.append(_rows(near, sequences, outputs))
    apart = (np.abs(np.concatenate(rows) - whole).max() for rows in others)
    return max(float(difference / np.ptp(whole)) for difference in apart)


def _with_other_bits(model: onnx.ModelProto, generator: np.random.Generator) -> onnx.ModelProto:
    """``model`` with half of the numbers of its weights moved to the next one to zero."""
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            array = numpy_helper.to_array(tensor)
            moved = np.nextafter(array, array.dtype.type(0))
            some = np.where(generator.random(array.shape) < 0.5, array, moved)
            tensor.CopyFrom(numpy_helper.from_array(some, tensor.name))
    return model


def _sequences(vocab: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, vocab, n).astype(np.int32) for n in _LENGTHS]


@cache
def _model(base: str) -> onnx.ModelProto:
    return TINY[base]() if base in TINY else onnx.load(corpus_path(base))


@cache
def _vocab(base: str) -> int:
    return Tiny().vocab if base in TINY else 130


_seen: dict[str, dict[str, np.ndarray]] = {}


def _values(base: str, folder: Path) -> dict[str, np.ndarray]:
    """What onnxruntime computes for each value of a base, on some tokens."""
    if base not in _seen:
        model = onnx.ModelProto()
        model.CopyFrom(_model(base))
        tokens = _sequences(_vocab(base))[-1][:_OBSERVED]
        _seen[base] = _every_value(model, tokens, folder / "observed.onnx")
    return _seen[base]


def _every_value(model: onnx.ModelProto, tokens: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """What onnxruntime computes for each value of ``model``, which is written to ``path``."""
    outputs = {o.name for o in model.graph.output}
    names = [o for n in model.graph.node for o in n.output if o]
    more = [helper.make_empty_tensor_value_info(o) for o in names if o not in outputs]
    model.graph.output.extend(more)
    onnx.save(model, path)
    found = Reference(path).run(tokens, names, _source(path))
    return dict(zip(names, found, strict=True))


def _has_no_number(path: Path, tokens: np.ndarray) -> bool:
    """Whether NaN comes up on the way: onnxruntime's softmax and its experts lose it."""
    values = _every_value(onnx.load(path), tokens, path.with_name("every.onnx"))
    return any(v.dtype.kind == "f" and np.isnan(v).any() for v in values.values())
