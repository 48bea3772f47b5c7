"""What a file that is no ONNX model is instead, by its first bytes, and what to do about it."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

_HEAD_BYTES = 1024
_EXPORT = (
    "export the model it was made from to ONNX, with torch.onnx.export, optimum-cli export onnx or "
    "onnxruntime-genai's model builder"
)
_AGAIN = "download the file itself, not the page that shows it"
_UNPACK = "unpack it, and give the .onnx file in it"
_LFS = "run `git lfs pull`"

# (where the bytes stand, the bytes, what has them, what to do)
_SIGNATURES: Sequence[tuple[int, bytes, str, str]] = (
    (4, b"ORTM", "a model in onnxruntime's own format (.ort)",
     "give the ONNX file that it was converted from"),
    (4, b"TFL3", "a TensorFlow Lite model", _EXPORT),
    (4, b"ET12", "an ExecuTorch program", _EXPORT),
    (0, b"GGUF", "a GGUF file (llama.cpp)", _EXPORT),
    (0, b"lmgg", "a GGML file (llama.cpp)", _EXPORT),
    (0, b"tjgg", "a GGML file (llama.cpp)", _EXPORT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", _EXPORT),
    (0, b"ftrt", "a TensorRT engine", _EXPORT),
    (0, b"ptrt", "a TensorRT engine", _EXPORT),
    (0, b"ML\xefR", "MLIR bytecode", _EXPORT),
    (0, b"\x7fELF", "a program or a shared library", "give the ONNX file"),
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file", _LFS),
    (0, b"version https://hawser.github.com/spec/", "a Git LFS pointer, not the file", _LFS),
    (0, b"/annex/objects/", "a git-annex pointer, not the file", "run `git annex get`"),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
)  # fmt: skip
_PICKLE = 0x80  # its first byte; then comes the protocol, of which there are six
_PICKLE_PROTOCOLS = range(2, 6)

# (the end of a member's name, what a zip archive with one is, what to do)
_ZIP_MEMBERS: Sequence[tuple[str, str, str]] = (
    (".onnx", "a zip archive", _UNPACK),
    ("/constants.pkl", "a TorchScript program", _EXPORT),
    ("/data.pkl", "a PyTorch checkpoint", _EXPORT),
    ("archive_format", "a PyTorch program (torch.export)", _EXPORT),
    ("serialized_exported_program.json", "a PyTorch program (torch.export)", _EXPORT),
    ("model.weights.h5", "a Keras model", _EXPORT),
    (".npy", "a numpy archive", _EXPORT),
)


def describe(path: Path) -> str | None:
    """What ``path`` is and what to do, as a part of an error's sentence; None where unknown.

    Raises OSError where it cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found = _file(path, head)
    return None if found is None else f"{found[0]}, not ONNX: {found[1]}"


def _file(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file that begins with ``head`` is, and what to do."""
    if not head:
        return "an empty file", "what was to write it did not finish; download or export it again"
    for offset, mark, what, advice in _SIGNATURES:
        if head[offset : offset + len(mark)] == mark:
            return what, advice
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head[0] == _PICKLE and len(head) > 1 and head[1] in _PICKLE_PROTOCOLS:
        return "a Python pickle (a PyTorch checkpoint)", _EXPORT
    size = int.from_bytes(head[:8], "little")  # of the JSON that safetensors begin with
    if head[8:9] == b"{" and size <= path.stat().st_size:
        return "a safetensors file", _EXPORT
    return _text(head)


def _text(head: bytes) -> tuple[str, str] | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page", _AGAIN
    if text.startswith(b"<?xml") and b"<net" in text:
        return "an OpenVINO model", _EXPORT
    if text.startswith(b"<?xml"):
        return "an XML file", "give the ONNX file"
    if text.startswith((b"<ir_version", b"ir_version:", b'{"irversion"')):
        return "a model in ONNX's text format", "save it in the binary one, with onnx.save"
    if text.startswith((b'{"', b"{\n", b"{\r\n", b"{ ", b"[", b"{}")):
        return "a JSON file", "give the ONNX file"
    return None


def _zip(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a damaged zip archive", _AGAIN
    for ending, what, advice in _ZIP_MEMBERS:
        if any(name.endswith(ending) for name in names):
            return what, advice
    return "a zip archive", _UNPACK


def _folder(path: Path) -> str:
    files = sorted(entry.name for entry in path.iterdir())
    models = [name for name in files if name.endswith(".onnx")]
    if "manifest.json" in files and "weights.bin" in files:
        return "a bundle, not ONNX: give the ONNX file that it was compiled from"
    if models:
        return f"a folder: give a file in it ({', '.join(models)})"
    if "saved_model.pb" in files:
        return f"a TensorFlow model, not ONNX: {_EXPORT}"
    if "config.json" in files:
        return f"a folder of a model that is not in ONNX: {_EXPORT}"
    return "a folder: give an ONNX file"
