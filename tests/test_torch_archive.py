"""Tensors come out of torch's files as torch reads them, and nothing else does."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from slmtvm.torch_archive import read_torch_archive


def _archive(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


class _Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/reached",)


def test_a_pickle_that_names_a_function_is_refused_unrun(tmp_path: Path) -> None:
    path = _archive(tmp_path / "x.bin", pickle.dumps({"linear.weight": _Command()}))
    with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.system"):
        read_torch_archive(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x02]q\x00.", b"nonsense", b"\x80\x02}q\x00"])
def test_a_pickle_of_no_tensors_is_an_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.save|where tensors by name"):
        read_torch_archive(_archive(tmp_path / "x.bin", data))


def test_what_is_no_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # how files before 1.6 begin
    with pytest.raises(ValueError, match="is no archive of tensors"):
        read_torch_archive(path)


@pytest.mark.slow
def test_tensors_are_those_that_torch_saved(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install '.[fixtures]'")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {
        "weight": base, "transposed": base.T, "part": base[1:3, ::2], "half": base.half(),
        "bfloat": base.bfloat16(), "parameter": torch.nn.Parameter(base[0]), "empty": base[:0],
        "number": torch.tensor(7),
    }  # fmt: skip
    torch.save(saved, tmp_path / "x.bin")
    found = read_torch_archive(tmp_path / "x.bin")
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.detach().float())
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no archive of tensors"):
        read_torch_archive(tmp_path / "x.bin")
