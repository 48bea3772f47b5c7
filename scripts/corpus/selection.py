"""The part of the corpus that is committed: which cells, and how they are packed.

A family's cells lie in one archive, so that weights that several files share are kept once.
"""

from __future__ import annotations

import fnmatch
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx

# Patterns of cells' names: every family by the exporters that most people use ...
_FAMILIES = (
    "*-dynamo", "*-dynamo-past", "*-script-masked", "*-optimum", "*-optimum-past",
    "*-optimum-merged", "*-builder-fp32", "*-builder-int4", "*-script-fixed",
)  # fmt: skip
# ... and every quantization and optimization, of the smallest model that it applies to.
_BERT = (
    "bert-*-fp16*", "bert-*-bf16*", "bert-optimum-dynamic-*", "bert-optimum-qdq-*",
    "bert-optimum-qoperator-*", "bert-*-blocked-*", "bert-*-float8-*",
    "bert-*-functions", "bert-*-fused*", "bert-*-ort-*", "bert-*-external", "bert-*-int32",
)  # fmt: skip
_DECODERS = (
    "llama-optimum-past-int[24]-*", "llama-optimum-past-int8-block32",
    "llama-optimum-past-int8-block256", "llama-optimum-past-int8-block32-zp",
    "llama-optimum-past-int8-level0", "llama-optimum-past-dynamic-s8-channel",
    "llama-optimum-past-ort-extended", "llama-optimum-past-functions",
    "llama-optimum-past-half-logits", "llama-optimum-past-reordered",
    "llama-optimum-past-external", "llama-optimum-past-fused-level2", "llama-optimum-qdq-u8s8",
    "llama-optimum-qoperator-u8s8", "qwen2-optimum-past-int4-*", "qwen2-dynamo-int4-bias",
    "gpt2-script-masked-fused", "gpt2-script-masked-fused-dynamic-s8",
    "gpt2-script-masked-qdq-u8s8", "gpt2-quickgelu-script-masked-ort-extended",
    "tinybert-*-fused", "distilbert-*-fused", "roberta-*-fused", "minilm-*-fused",
    "llama-builder-*", "lfm2-moe-builder-*", "qwen2-builder-mixed", "qwen3-builder-shared",
    "minilm-dynamo-masked-dynamic-s8", "t5-optimum-dynamic-s8", "gpt2-optimum-merged-dynamic-s8",
)  # fmt: skip
# ... and every head, the four by each exporter once, and in each kind of quantization.
_HEADS = (
    "distilbert-dynamo-sequence", "distilbert-optimum-sequence",
    "distilbert-optimum-sequence-dynamic-s8", "distilbert-optimum-token", "distilbert-dynamo-span",
    "distilbert-optimum-span-fp16", "distilbert-script-embedding", "mpnet-script-sequence",
    "mpnet-optimum-sequence-qdq-u8s8", "mpnet-dynamo-token", "mpnet-optimum-span",
    "mpnet-dynamo-embedding", "mpnet-script-embedding-int4-block32", "electra-optimum-sequence",
    "electra-optimum-token-fp16", "electra-dynamo-embedding", "qwen3-dynamo-sequence",
    "qwen3-optimum-sequence", "bart-script-sequence",
    "bart-script-sequence-qdq-u8s8", "roberta-optimum-sequence",
)  # fmt: skip
# ... and of pruned models, which would be committed as all others are, these.
_PRUNED = (
    "bert-dynamo-pruned-2-4", "bert-dynamo-pruned-free-sparse", "bert-pruned-optimum-dynamic-s8",
    "bert-pruned-optimum-qdq-u8s8", "llama-pruned-optimum-past-int4-block32",
)  # fmt: skip
_LEFT_OUT = (
    "bert-dynamo-masked-fused-*", "bert-optimum-fused-*",
    # onnxruntime 1.31 refuses what that release wrote of their heads.
    "mistral-builder0.5-*", "llama-builder0.5-*", "gemma2-builder0.5-*",
    # Most of an archive are weights: these share none with the other cells of their family, and
    # one family without relative positions is enough.
    "bart-optimum-[!mp]*", "bart-optimum1*", "marian-*",
)  # fmt: skip
# Of the other cells of a route or a transform, one in so many, and one where there is no other:
# those whose names have the least checksums, which favours no family.
_ONE_OF_ROUTE, _ONE_OF_TRANSFORM = 5, 16
INDEX = "files.txt"  # of what the archives hold
FAILED = "failed.txt"  # in a cell that has no file: why
TASK_HEADS = ("sequence", "token", "span", "embedding")
_NAME = re.compile(
    r"(?P<family>.+?)-(?P<route>builder[\d.]*-.+|(?:dynamo5?|script|optimum[\d.]*)"
    r"(?:-(?:fixed|masked|eager|bfloat16|states|positions|past-tied|past-untied|past|merged|opset\d+"
    rf"|{'|'.join(TASK_HEADS)}))?)"
    r"(?:-(?P<transform>.+))?"
)
_KEPT = (".onnx", ".data", "_data")


def selected(cells: Iterable[str]) -> list[str]:
    """The cells that are committed, of those that there are, in order."""
    named = {
        cell: split_name(cell)
        for cell in cells
        if not (is_pruned(cell) or _any(cell, _LEFT_OUT)) or cell in _PRUNED
    }
    chosen = {
        cell for cell in named if _any(cell, (*_FAMILIES, *_BERT, *_DECODERS, *_HEADS, *_PRUNED))
    }
    for kind, one_of in (("route", _ONE_OF_ROUTE), ("transform", _ONE_OF_TRANSFORM)):
        groups: dict[str, list[str]] = {}
        for cell, name in named.items():
            if kind == ("transform" if name.transform else "route"):
                groups.setdefault(getattr(name, kind), []).append(cell)
        for names in groups.values():
            others = sorted(set(names) - chosen, key=lambda cell: zlib.crc32(cell.encode()))
            least = int(len(others) == len(names))
            chosen.update(others[: max(len(others) // one_of, least)])
    return sorted(chosen)


def _any(cell: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(cell, pattern) for pattern in patterns)


def is_pruned(cell: str) -> bool:
    """Whether zeros were put into its weights, before it was exported or after."""
    name = split_name(cell)
    return name.family.endswith("-pruned") or name.transform.startswith("pruned-")


def is_model(name: str) -> bool:
    """Whether a file is a model by itself, or with an encoder beside it.

    The decoder that optimum writes for the steps after the first is not: it takes what the first
    decoder computes of the source.
    """
    return name.endswith(".onnx") and name != "decoder_with_past_model.onnx"


@dataclass(frozen=True)
class CellName:
    """The parts of a cell's name; ``transform`` is empty for an export as it is."""

    family: str
    route: str
    transform: str

    @property
    def head(self) -> str:
        """One of TASK_HEADS, "" for a model without."""
        last = self.route.rpartition("-")[2]
        return last if last in TASK_HEADS else ""


def split_name(cell: str) -> CellName:
    """The parts of <family>-<route>[-<transform>...]."""
    match = _NAME.fullmatch(cell)
    if match is None:
        raise ValueError(f"{cell!r} is no cell's name")
    return CellName(match["family"], match["route"], match["transform"] or "")


def left_out(corpus: Path) -> dict[str, str]:
    """The cells that could not be made, and the first line of what was raised."""
    reasons = {p.parent.name: p.read_text() for p in sorted(corpus.glob(f"*/{FAILED}"))}
    return {cell: reason.splitlines()[0] for cell, reason in reasons.items()}


def pack(corpus: Path, folder: Path) -> None:
    """Write ``folder``/<family>.tar.xz for every family that has selected cells, and a list."""
    folder.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[Path]] = {}
    for cell in selected({path.parent.name for path in corpus.glob("[!.]*/*.onnx")}):
        cells.setdefault(split_name(cell).family, []).append(corpus / cell)
    files = []
    for family, members in cells.items():
        (folder / f"{family}.tar.xz").write_bytes(_archive(members))
        files += [f"{cell.name}/{path.name}" for cell in members for path in cell.glob("*.onnx")]
    (folder / INDEX).write_text("\n".join(sorted(files)) + "\n")


def _archive(cells: list[Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for cell in cells:
            for path in sorted(p for p in cell.iterdir() if p.name.endswith(_KEPT)):
                data = _bare(path)
                entry = tarfile.TarInfo(f"{cell.name}/{path.name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    # In a window that holds all of a family's files: weights of several are the same.
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": 1 << 26}]
    return lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=filters)


def _bare(path: Path) -> bytes:
    """A file's bytes without the stack traces, and this machine's paths, that torch notes."""
    data = path.read_bytes()
    if path.suffix != ".onnx":
        return data
    model = onnx.ModelProto.FromString(data)
    graph = model.graph
    functions = [node for function in model.functions for node in function.node]
    parts = [*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]
    for part in (*parts, *functions, *model.functions, graph, model):
        del part.metadata_props[:]
    for node in (*graph.node, *functions):
        node.ClearField("doc_string")
    return model.SerializeToString(deterministic=True)
