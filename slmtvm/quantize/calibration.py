"""What a model sees on a sample of text: the inputs of its layers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, helper
from tokenizers import Tokenizer

from slmtvm.errors import InvalidModelError, SlmError
from slmtvm.text import read_tokenizer
from slmtvm.verify.reference import Reference
from slmtvm.verify.token_files import encode_text, read_ids, read_text

WINDOW = 128  # tokens that are evaluated together, from position 0
MAX_WINDOWS = 32  # 4,096 tokens: the error of a layer changes little with more

Tokens = npt.NDArray[np.int64]


def read_tokens(path: Path, tokenizer: Path | None) -> list[Tokens]:
    """Windows of token ids: of a text, which goes through ``tokenizer``, or of a .npy file.

    A .npy file holds integers (n,), which are cut into windows of WINDOW, or (windows, n). The
    first MAX_WINDOWS are taken. Raises SlmError where the file is neither, or no tokenizer is
    there.
    """
    if path.suffix == ".npy":
        ids = read_ids(path)
        if ids.ndim == 2:
            return [row.astype(np.int64) for row in ids[:MAX_WINDOWS]]
        return _windows(ids, path)
    text = read_text(path)
    if tokenizer is None:
        raise SlmError(
            "there is no tokenizer to read the calibration text with; name one with --tokenizer, "
            "or give token ids in a .npy file",
            where=str(path),
        )
    reader = Tokenizer.from_buffer(read_tokenizer(tokenizer))
    return _windows(encode_text(reader, text), path)


def _windows(ids: npt.NDArray[np.integer], path: Path) -> list[Tokens]:
    if len(ids) < 2:
        raise SlmError(f"{len(ids)} tokens; at least 2 are needed", where=str(path))
    size = min(WINDOW, len(ids))
    starts = range(0, len(ids) - size + 1, size)
    return [ids[start : start + size].astype(np.int64) for start in starts[:MAX_WINDOWS]]


class Feeds:
    """Iterates over the inputs of the windows, again and again, as onnxruntime's readers do."""

    def __init__(self, reference: Reference, windows: Sequence[Tokens]) -> None:
        self._reference, self._windows = reference, windows
        self._rest: Iterator[dict[str, npt.NDArray[np.generic]]] = iter(())
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self._rest = (self._reference.feeds(window) for window in self._windows)

    def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
        """The inputs of the next window, or None after the last."""
        return next(self._rest, None)

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
        return (self._reference.feeds(window) for window in self._windows)

    def __deepcopy__(self, _memo: object) -> Feeds:
        return Feeds(self._reference, self._windows)  # the session cannot be copied, nor need it


def second_moments(
    model: ModelProto, values: Sequence[str], windows: Sequence[Tokens]
) -> dict[str, npt.NDArray[np.float32]]:
    """``mean(x x^T)`` (k, k) over the rows x of each of ``values``, in ``model`` on ``windows``.

    The squared error of a layer's output, when its weight is off by D (k, n), is the trace of
    ``D^T M D`` with this M: one pass over the text serves every way of quantizing every layer.
    """
    names = list(dict.fromkeys(values))
    if not names:
        return {}
    sums: dict[str, npt.NDArray[np.float32]] = {}
    probe = ModelProto()
    probe.CopyFrom(model)
    have = {output.name for output in probe.graph.output}
    probe.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in have
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "probe.onnx"
        save(probe, path)
        reference = Reference(path)
        for window in windows:
            for name, value in zip(names, reference.run(window, names), strict=True):
                x = value.reshape(-1, value.shape[-1]).astype(np.float32)
                sums[name] = sums.get(name, np.float32(0)) + x.T @ x
    rows = np.float32(sum(map(len, windows)))
    return {name: total / rows for name, total in sums.items()}


_MAX_PROTO_BYTES = 1_900_000_000  # protobuf's limit is 2 GB


def save(model: ModelProto, path: Path) -> None:
    """Write ``model``, its weights beside it in ``path``.data where they are over 1.9 GB."""
    try:
        if model.ByteSize() < _MAX_PROTO_BYTES:
            path.write_bytes(model.SerializeToString())
        else:
            onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    except (OSError, ValueError) as error:
        raise InvalidModelError(f"cannot be written: {error}", where=str(path)) from error


def write(model: ModelProto, target: Path) -> None:
    """The file ``target``, whole or not at all; raises SlmError where its folder is not there."""
    if not target.parent.is_dir():
        raise SlmError("no such folder", where=str(target.parent))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        path = Path(scratch) / target.name
        save(model, path)
        for part in sorted(Path(scratch).iterdir(), reverse=True):  # the weights before the graph
            part.replace(target.parent / part.name)
