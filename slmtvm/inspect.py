"""What is in an ONNX file: ``slmtvm inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer import import_with_mask
from slmtvm.importer.faults import words
from slmtvm.importer.read.load import count_operators
from slmtvm.importer.read.redact import redact
from slmtvm.ir.kv_range import beyond_half, note_of
from slmtvm.ir.model import CanonicalModel, LayerReport, Output
from slmtvm.ir.params import Params
from slmtvm.plan.setup import CHUNKS
from slmtvm.schedules.attention import capacity_of, ring_of
from slmtvm.sparse_layers import sparse_lines
from slmtvm.target import Target, known_targets

_READ_ONCE = ("embedding", "position table")  # a token reads one row
_KV_BYTES = 2  # of a float16
_KEYS_AND_VALUES = 2
_MASKS = {
    "keys": "arbitrary ones: hidden tokens are keys without weight, and their positions count",
    "skip": "arbitrary ones: hidden tokens are left out, and positions count the others",
    "none": "",
}


@dataclass(frozen=True)
class Estimate:
    """What reading alone would allow on one core of a target: a model, not a measurement.

    ``bytes_per_token``: the weights that a decoded token reads, and half a context of KV cache.
    """

    target: str
    bytes_per_token: int
    read_gb_per_second: float
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.target}: {_size(self.bytes_per_token)} a token at "
            f"{self.read_gb_per_second:g} GB/s, {self.tokens_per_second:,.0f} tokens/s"
        )


@dataclass(frozen=True)
class Inspection:
    """What was recognised in a file; ``str()`` is the text, ``to_dict()`` the same as data.

    Where the file cannot be compiled, ``unsupported`` says why and the recognised parts are empty.
    Sizes are in bytes; ``kv_bytes_per_token`` is of a float16 cache (twice that for
    float32), 0 for an encoder.
    """

    file: str
    operators: dict[str, int]
    unsupported: str = ""
    family: str = ""
    outputs: tuple[Output, ...] = ()
    kind: str = ""
    layers: int = 0
    heads: int = 0
    kv_heads: tuple[int, ...] = ()  # the different numbers there are; most models have one
    head_dim: tuple[int, ...] = ()
    hidden_size: int = 0
    vocab_size: int = 0
    context: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_windows: dict[int, int] = field(default_factory=dict)  # positions kept: by so many layers
    weights: tuple[LayerReport, ...] = field(default=())
    estimates: tuple[Estimate, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    float_activation_layers: int = 0  # of integer weights
    mask: str = "none"  # what hidden tokens are with --mask arbitrary: "keys" or "skip"
    no_mask: str = ""  # where that option is refused, why

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        if self.unsupported:
            counts = ", ".join(f"{n} {name}" for name, n in self.operators.items())
            return f"{self.file}\n  operators  {counts}\n  cannot be compiled: {self.unsupported}"
        heads = (
            f"{self.heads} heads, {_some(self.kv_heads)} kv heads, head_dim {_some(self.head_dim)}"
        )
        lines = [
            self.file,
            f"  family     {self.family} ({self.kind})",
            *(f"  output     {_output(output)}" for output in self.outputs),
            f"  layers     {self.layers} ({heads})",
            f"  hidden     {self.hidden_size}",
            f"  vocabulary {self.vocab_size}",
            f"  context    {self.context}",
            f"  weights    {_size(self.weight_bytes)}",
            f"  KV cache   {_size(self.kv_bytes_per_token)} per token in float16",
            *(
                f"             {layers} of {self.layers} layers keep {positions} positions of it"
                for positions, layers in self.kv_windows.items()
            ),
            f"  mask       {_MASKS[self.mask] or f'none: {self.no_mask}'}",
            *_activations(self.float_activation_layers),
            *_table(self.weights),
        ]
        if sparse := sparse_lines(self.weights):
            lines.append("  zeros in weights, and what becomes of them:")
            lines += [f"    {line}" for line in sparse]
        if self.estimates:
            lines.append("  limits of one core by reading alone, modelled, not measured:")
            lines += [f"    {estimate}" for estimate in self.estimates]
        lines += [f"  note: {note}" for note in self.notes] or ["  nothing was left out"]
        return "\n".join(lines)


def inspect(
    path: str | Path, *, context: int | None = None, encoder: str | Path | None = None
) -> Inspection:
    """What the importer recognises in the ONNX file ``path``; ``context`` and ``encoder`` as for
    ``import_onnx``.

    Raises InvalidModelError where the file is damaged; what is only unsupported is reported.
    """
    operators = count_operators(path)
    try:
        model, no_mask = import_with_mask(path, context=context, encoder=encoder)
    except UnsupportedOpError as error:
        return Inspection(str(path), operators, unsupported=str(error))
    return replace(_describe(model, operators), no_mask=no_mask)


def _describe(model: CanonicalModel, operators: dict[str, int]) -> Inspection:
    cached = sum(spec.num_kv_heads * spec.head_dim for spec in model.kv)
    largest = beyond_half(model)
    per_token = _KEYS_AND_VALUES * _KV_BYTES * cached if model.kind != "encoder" else 0
    return Inspection(
        file=str(model.source),
        operators=operators,
        family=model.family,
        outputs=model.outputs,
        kind=model.kind,
        layers=len(model.kv),
        heads=model.num_heads,
        kv_heads=tuple(sorted({spec.num_kv_heads for spec in model.kv})),
        head_dim=tuple(sorted({spec.head_dim for spec in model.kv})),
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context=model.context,
        weight_bytes=Params(model.params).nbytes,
        kv_bytes_per_token=per_token,
        kv_windows=_windows(model),
        weights=model.layers,
        estimates=_estimates(model, per_token) if model.kind != "encoder" else (),
        notes=(*model.notes, *([note_of(largest)] if largest else [])),
        float_activation_layers=model.float_activation_layers,
        mask=model.mask,
    )


def _windows(model: CanonicalModel) -> dict[int, int]:
    """How many layers keep how many positions, where these are less than the context's."""
    if model.kind == "encoder":
        return {}
    rows = max(r for r in CHUNKS if r <= model.context)
    capacity = capacity_of(model.context)
    rings = (ring_of(spec.sight, rows, capacity) for spec in model.kv if spec.sight)
    return dict(sorted(Counter(ring for ring in rings if ring).items()))


def _estimates(model: CanonicalModel, kv_bytes: int) -> tuple[Estimate, ...]:
    read = sum(layer.weight_bytes for layer in model.layers if layer.kind not in _READ_ONCE)
    read += kv_bytes * model.context // 2
    found = []
    for name in known_targets():
        rate = Target.load(name).read_gb_per_second
        if rate is not None:
            found.append(Estimate(name, read, rate, rate * 1e9 / read))
    return tuple(found)


def write_report(path: str | Path, output: str | Path) -> None:
    """Write the ONNX file ``path`` without its weights' values, for others to look into.

    ``slmtvm inspect`` reads the result like any model, with random weights. Raises
    InvalidModelError where ``path`` is no ONNX file, SlmError where ``output`` cannot be written.
    """
    count_operators(path)  # says what is wrong with the file
    try:
        data = redact(Path(path)).SerializeToString()
    except MemoryError:
        raise
    except Exception as error:  # whatever onnx raises for what a damaged file says
        raise InvalidModelError(
            f"cannot be written out: {words(error)}", where=str(path)
        ) from error
    try:
        Path(output).write_bytes(data)
    except OSError as error:
        raise SlmError(f"cannot be written: {error.strerror}", where=str(output)) from error


def _activations(layers: int) -> list[str]:
    if not layers:
        return []
    return [f"  activations {layers} layers ask for float32 ones: int8 unless compiled with "
            "--activations file"]  # fmt: skip


def _output(output: Output) -> str:
    of = "the whole text" if output.pooled else "each token"
    return f"{output.name}: {output.features} numbers for {of}"


def _some(numbers: tuple[int, ...]) -> str:
    return "/".join(str(n) for n in numbers)


def _size(count: int) -> str:
    return f"{count:,} bytes"


def _table(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line for each kind of layer that has the same shape and quantization."""
    groups: Counter[tuple[str, str, str]] = Counter()
    total: Counter[tuple[str, str, str]] = Counter()
    first: dict[tuple[str, str, str], str] = {}
    for layer in layers:
        key = (layer.kind, *_shape_and_format(layer))
        groups[key] += 1
        total[key] += layer.weight_bytes
        first.setdefault(key, layer.name)
    rows = [("count", "layer", "shape", "weights", "bytes", "first")]
    for key in groups:
        kind, shape, detail = key
        rows.append((str(groups[key]), kind, shape, detail, f"{total[key]:,}", first[key]))
    return _aligned(rows)


def layer_table(layers: tuple[LayerReport, ...]) -> str:
    """A line for every layer that has weights, in the order in which they are computed."""
    rows = [("layer", "shape", "weights", "bytes", "name")]
    for layer in layers:
        shape, detail = _shape_and_format(layer)
        rows.append((layer.kind, shape, detail, f"{layer.weight_bytes:,}", layer.name))
    return "\n".join(_aligned(rows))


def _shape_and_format(layer: LayerReport) -> tuple[str, str]:
    shape = " x ".join(str(d) for d in layer.shape)
    group = f"group {layer.group_size}" if layer.group_size else ""
    channels = f"blocks of {layer.group_channels} channels" if layer.group_channels else ""
    return shape, " ".join(filter(None, (layer.format, group, channels, layer.sparsity)))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
