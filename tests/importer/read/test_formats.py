"""Files and folders that are no ONNX model, named for what they are."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from slmtvm.errors import InvalidModelError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.formats import describe
from slmtvm.inspect import inspect, write_report
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OPENVINO = b'<?xml version="1.0"?>\n<net name="main" version="11">\n<layers/></net>\n'


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.onnx"))
    return data.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def flatbuffer(mark: bytes) -> bytes:
    return b"\x18\0\0\0" + mark + bytes(64)


FILES = {
    "a model in onnxruntime's own format": (flatbuffer(b"ORTM"), "converted from"),
    "a TensorFlow Lite model": (flatbuffer(b"TFL3"), "torch.onnx.export"),
    "an ExecuTorch program": (flatbuffer(b"ET12"), "torch.onnx.export"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + bytes(64), "torch.onnx.export"),
    "a safetensors file": (safetensors(), "torch.onnx.export"),
    "an HTML page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "download"),
    "a Git LFS pointer": (POINTER, "git lfs pull"),
    "a zip archive": (zipped("model.onnx", "config.json"), "unpack"),
    "a PyTorch checkpoint": (zipped("archive/data.pkl", "archive/data/0"), "torch.onnx.export"),
    "a TorchScript program": (zipped("m/data.pkl", "m/constants.pkl"), "torch.onnx.export"),
    "a Python pickle": (pickle.dumps({"w": 1}, protocol=2), "torch.onnx.export"),
    "a numpy archive": (zipped("w.npy"), "torch.onnx.export"),
    "a damaged zip archive": (zipped("model.onnx")[:40], "download"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(64), "torch.onnx.export"),
    "an OpenVINO model": (OPENVINO, "torch.onnx.export"),
    "a gzip archive": (gzip.compress(b"model"), "unpack"),
    "a tar archive": (tarred(), "unpack"),
    "an empty file": (b"", "download or export it again"),
    "a model in ONNX's text format": (b'<ir_version: 9, opset_import: ["": 18]>', "onnx.save"),
    "a JSON file": (b'{"model_type": "llama"}', "the ONNX file"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_another_format_is_named_with_what_to_do(what, tmp_path):
    data, advice = FILES[what]
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    for read in (import_onnx, inspect, lambda p: write_report(p, tmp_path / "report.onnx")):
        with pytest.raises(InvalidModelError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: this is {what}")
        assert "not ONNX: " in message
        assert advice in message
        assert "\n" not in message


@pytest.mark.parametrize(("names", "what"), [
    ((), "a folder: give an ONNX file"),
    (("b.onnx", "a.onnx"), "a folder: give a file in it (a.onnx, b.onnx)"),
    (("config.json", "model.safetensors"), "a folder of a model that is not in ONNX: export"),
    (("saved_model.pb",), "a TensorFlow model, not ONNX: export"),
    (("manifest.json", "weights.bin"), "a bundle, not ONNX: give the ONNX file"),
])  # fmt: skip
def test_a_folder_is_named_with_what_to_do(names, what, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InvalidModelError) as caught:
        import_onnx(tmp_path)
    assert f"{tmp_path}: this is {what}" in str(caught.value)


def test_a_model_over_2_gb_is_named_for_its_format(tmp_path):
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(3 << 30)
    with pytest.raises(InvalidModelError, match="this is a GGUF file"):
        import_onnx(path)
    with path.open("r+b") as file:
        file.write(b"\x08\x09\x12\x04")
    with pytest.raises(InvalidModelError, match="a file of over 2 GB"):
        import_onnx(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(InvalidModelError, match="not a file"):
        import_onnx(tmp_path / "pipe.onnx")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def read_bytes(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = save(build(Tiny()), tmp_path)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(InvalidModelError, match="cannot be read: Permission denied"):
        import_onnx(path)


def test_onnx_files_and_noise_are_no_other_format(tmp_path):
    assert describe(save(build(Tiny()), tmp_path)) is None
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 9, 300, 5000):
        (tmp_path / "noise").write_bytes(b"\x08" + random.bytes(size))
        assert describe(tmp_path / "noise") is None
