"""Marks in the scales of quantized weights, by which a key's holder knows a model: embed, detect.

The mark is in the last of 11 bits that a scale keeps of its value. A secret function of the bits
before says what the last one has to be, so that no order of the weights matters: those of an ONNX
file are found again in a bundle for any target, signed or packed however. A weight changes by at
most 0.15%, less than a fifth of a step of 8 bits.

Each row of leading bits votes once, by the majority of the scales that have it. For a file that was
made without the key each vote is right with a probability of 1/2, whatever the file holds; the
number of right ones has a binomial distribution, and what ``Evidence.log10_p`` says is exact.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from slmtvm.bundle import Bundle
from slmtvm.bundle.read import MANIFEST
from slmtvm.errors import BundleError, InvalidModelError, SlmError
from slmtvm.files import no_such_file, read_file
from slmtvm.quantize.calibration import write

LEAST_KEY_BYTES = 16
THRESHOLD = -9.0  # log10 of the probability below which a mark is there
_MOST_KEY_BYTES = 4096
_DROPPED = 13  # low bits of a float32, which marked scales have not: they are numbers of float16
_LEAST_VOTES = 64  # of a file that is to be marked: 2^-64 is little enough to prove something
_MOST_BLOCK = 1 << 22  # words that are looked at together
_DOMAIN = b"slmtvm watermark 1:"
# Where scales are: (domain, operator) -> (input of integers, input of their scales).
_SCALES = {
    ("com.microsoft", "MatMulNBits"): (1, 2),
    ("com.microsoft", "GatherBlockQuantized"): (0, 2),
    ("", "DequantizeLinear"): (0, 1),
    ("com.microsoft", "DequantizeLinear"): (0, 1),
}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Evidence:
    """What a file says of a key."""

    votes: int
    right: int

    @property
    def log10_p(self) -> float:
        """log10 of the probability that a key without a part in it has as many right."""
        n, least = self.votes, self.right
        if least <= 0:
            return 0.0
        logs = [
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            for k in range(least, n + 1)
        ]
        largest = max(logs)
        total = largest + math.log(sum(math.exp(value - largest) for value in logs))
        return min(0.0, (total - n * math.log(2)) / math.log(10))

    @property
    def found(self) -> bool:
        """Whether the mark is there: less than one key of a thousand millions says so by chance."""
        return self.log10_p < THRESHOLD


@dataclass(frozen=True)
class Marked:
    """What ``embed`` did."""

    scales: int
    changed: int
    largest: float  # relative change of a scale, and so of its weights
    evidence: Evidence


class Ballot:
    """The votes of scales, which can be counted for any number of keys."""

    def __init__(self) -> None:
        self._tally: dict[int, int] = {}  # leading bits -> scales that end in 1, less those in 0

    def add(self, words: Words) -> None:
        """``words`` are the bits of scales' magnitudes."""
        kept, counts = np.unique(words[_usable(words)] >> _DROPPED, return_counts=True)
        for value, number in zip(kept.tolist(), counts.tolist(), strict=True):
            lead, last = divmod(value, 2)
            self._tally[lead] = self._tally.get(lead, 0) + (number if last else -number)

    def add_all(self, several: Iterable[Words]) -> None:
        """``add`` for each of ``several``."""
        for words in several:
            self.add(words)

    def evidence(self, key: bytes) -> Evidence:
        """How many of the votes are as ``key`` wants them."""
        voters = {lead: tally > 0 for lead, tally in self._tally.items() if tally}
        wanted = _wanted(key, voters)
        return Evidence(len(voters), sum(wanted[lead] == last for lead, last in voters.items()))


def read_key(path: str | Path) -> bytes:
    """The key: the content of a file. Raises SlmError where that is shorter than 16 bytes."""
    content = read_file(path, _MOST_KEY_BYTES)
    if len(content) < LEAST_KEY_BYTES:
        raise SlmError(
            f"{len(content)} bytes are no key: it has {LEAST_KEY_BYTES} at least, of which nobody "
            "knows any (head -c 32 /dev/urandom)",
            where=f"{path}",
        )
    return content


def embed(model: str | Path, key: bytes, output: str | Path) -> Marked:
    """Write the quantized ONNX file ``model`` with the mark of ``key`` to ``output``.

    Raises SlmError where it cannot be read or written, or has too few different scales for a mark
    to prove anything; then nothing is written.
    """
    proto = _load(Path(model))
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    scales = changed = 0
    largest = 0.0
    ballot = Ballot()
    for name in _scale_names(proto):
        before = numpy_helper.to_array(tensors[name])
        after = _mark(before.astype(np.float32), key).astype(before.dtype)
        ballot.add(_words(after.astype(np.float32)))
        scales += before.size
        changed += int(np.count_nonzero(before != after))
        there = before != 0
        relative = np.abs(after[there].astype(np.float64) / before[there] - 1)
        largest = max(largest, float(relative.max(initial=0)))
        tensors[name].CopyFrom(numpy_helper.from_array(after, name))
    evidence = ballot.evidence(key)
    if evidence.votes < _LEAST_VOTES or evidence.log10_p > THRESHOLD:
        raise SlmError(
            f"has {scales} scales of quantized weights, {evidence.votes} of which differ enough: "
            "too few for a mark. Quantize it in groups (slmtvm quantize --group 32)",
            where=f"{model}",
        )
    write(proto, Path(output))
    return Marked(scales, changed, largest, evidence)


def detect(path: str | Path, key: bytes) -> Evidence:
    """What the weights in ``path`` say of ``key``: see ``read_ballot``."""
    return read_ballot(path).evidence(key)


def read_ballot(path: str | Path) -> Ballot:
    """The scales in ``path``: an ONNX file, a bundle, or any other file.

    In files that are neither, and in bundles, every number that could be a scale is looked at.
    Raises SlmError where it cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise SlmError(no_such_file(place))
    ballot = Ballot()
    if place.is_dir():
        ballot.add_all(_numbers(_bundle_weights(place)))
    elif place.suffix == ".onnx":
        proto = _load(place)
        tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name in _scale_names(proto):
            ballot.add(_words(numpy_helper.to_array(tensors[name]).astype(np.float32)))
    else:
        ballot.add_all(_numbers(place))
    return ballot


def _load(path: Path) -> ModelProto:
    if not path.is_file():
        raise SlmError(no_such_file(path))
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's and onnx's own kinds are many
        raise InvalidModelError(f"no ONNX file: {error}", where=f"{path}") from error


def _scale_names(model: ModelProto) -> list[str]:
    """Initializers that scale integers which are initializers, too."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        places = _SCALES.get((domain, node.op_type))
        if places and len(node.input) > max(places):
            integers, scale = (node.input[place] for place in places)
            if integers in kinds and kinds.get(scale) in _FLOATS:
                found[scale] = True
    return list(found)


def _bundle_weights(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise SlmError(f"no bundle: it has no {MANIFEST}", where=f"{folder}")
    bundle = Bundle.open(folder)
    if bundle.encrypted:
        raise BundleError("its weights are encrypted: take the bundle of before", where=f"{folder}")
    return folder / bundle.manifest.weights.file


def _numbers(path: Path) -> Iterable[Words]:
    """The words of a file, as float32 and as float16, that could be marked scales."""
    try:
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise SlmError(f"cannot be read: {error.strerror}", where=f"{path}") from error
    for start in range(0, content.size, 4 * _MOST_BLOCK):
        block = content[start : start + 4 * _MOST_BLOCK]
        words = block[: block.size // 4 * 4].view("<u4").astype(np.uint32) & 0x7FFFFFFF
        yield words[(words & ((1 << _DROPPED) - 1)) == 0]
        halves = block[: block.size // 2 * 2].view("<f2")
        with np.errstate(all="ignore"):
            yield _words(halves.astype(np.float32))


def _words(values: npt.NDArray[np.float32]) -> Words:
    """The bits of the magnitudes, rounded to 11 bits, and those that are dropped zero."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32) & 0x7FFFFFFF
    half = np.uint32(1 << (_DROPPED - 1))
    return ((bits + half) >> _DROPPED << _DROPPED).astype(np.uint32)


def _usable(words: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which are of finite numbers besides 0, of a scale's size: 2^-40 to 2^8."""
    exponent = words >> 23
    return (exponent >= 127 - 40) & (exponent < 127 + 8)


def _wanted(key: bytes, leads: Iterable[int]) -> Mapping[int, bool]:
    """The last bit that the key wants after each row of leading bits."""
    return {
        lead: hmac.digest(key, _DOMAIN + lead.to_bytes(4, "little"), hashlib.sha256)[0] % 2 == 1
        for lead in leads
    }


def _mark(values: npt.NDArray[np.float32], key: bytes) -> npt.NDArray[np.float32]:
    """The nearest values that the key allows; 0 and what is no scale stay."""
    flat = np.ascontiguousarray(values).reshape(-1).copy()
    bits = flat.view(np.uint32)
    usable = _usable(bits & 0x7FFFFFFF)
    magnitude = (bits[usable] & 0x7FFFFFFF).astype(np.int64)
    lead = magnitude >> (_DROPPED + 1)
    near = np.unique(lead)
    wanted = _wanted(key, np.unique(np.concatenate([near - 1, near, near + 1])).tolist())
    table = np.array(
        [[(p << 1 | wanted[p]) << _DROPPED for p in (q - 1, q, q + 1)] for q in near.tolist()],
        np.int64,
    ).reshape(-1, 3)
    choices = table[np.searchsorted(near, lead)]
    nearest = np.abs(choices - magnitude[:, None]).argmin(axis=1)
    chosen = choices[np.arange(len(choices)), nearest].astype(np.uint32)
    bits[usable] = bits[usable] & np.uint32(0x80000000) | chosen
    return flat.reshape(values.shape)
