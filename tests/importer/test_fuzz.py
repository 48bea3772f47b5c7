"""Damaged files: an import ends in a model or in an SlmError, and in nothing else."""

from __future__ import annotations

import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import onnx
import pytest

from slmtvm.errors import SlmError
from slmtvm.importer import import_onnx
from tests.importer.graphs import Tiny, build
from tests.importer.mutations import damaged_files
from tests.importer.test_builder_graphs import Built, write
from tests.models.quantizers import quantize_int4, quantize_int8

CONTEXT = 48
HANG_SECONDS = 60  # for one file of a few kilobytes
ENDINGS = {"imported", "InvalidModelError", "UnsupportedOpError"}
EXTRA_BYTES = 2 << 30  # address space that the imports may take on top of what is there already


def decoder(folder: Path) -> onnx.ModelProto:
    return build(Tiny(rope="rotate_half", heads=4, kv_heads=2, tied=True, layers=2))


def old_decoder(folder: Path) -> onnx.ModelProto:
    tiny = Tiny(norm="layer_operator", learned_positions=64, activation="gelu_tanh", bias=True)
    return build(tiny)


def int4(folder: Path) -> onnx.ModelProto:
    model = build(Tiny(hidden=32, ffn=40, rope="interleaved", mask="sliced"))
    return quantize_int4(model, symmetric=False)


def int8_encoder(folder: Path) -> onnx.ModelProto:
    onnx.save(build(Tiny(bias=True, mask="none", learned_positions=50)), folder / "float.onnx")
    quantize_int8(folder / "float.onnx", folder / "int8.onnx", per_channel=True)
    return onnx.load(folder / "int8.onnx")


def whole_layers(folder: Path) -> onnx.ModelProto:
    return write(Built(layers=1, hidden=64, accuracy_level=4, shared_embedding=True))


def rotary_operators(folder: Path) -> onnx.ModelProto:
    return write(Built(layers=1, rotary="heads", skip="SkipLayerNormalization", skip_bias=True))


MODELS = (decoder, old_decoder, int4, int8_encoder, whole_layers, rotary_operators)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """A huge allocation fails as MemoryError, which no test expects."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def no_hang() -> Iterator[None]:
    """Raises in the middle of an import that does not end."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError("the import hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(make, folder: Path, count: int, seed: int) -> Counter[str]:
    """How the imports of ``count`` damaged files ended; an error that names no file, in full."""
    path = folder / "model.onnx"
    results: Counter[str] = Counter()
    model = make(folder)
    with bounded_memory():
        for index, data in enumerate(damaged_files(model, count, seed)):
            path.write_bytes(data)
            try:
                with no_hang():
                    import_onnx(path, context=CONTEXT)
                results["imported"] += 1
            except SlmError as error:
                named = str(path) in str(error)
                results[type(error).__name__ if named else f"file {index}: {error}"] += 1
    return results


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_damaged_files_end_in_an_error_that_names_them(make, tmp_path):
    results = fuzz(make, tmp_path, count=200, seed=1)
    assert results.keys() <= ENDINGS
    assert results["InvalidModelError"] > 50
    assert results["UnsupportedOpError"] > 0


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("seed", range(2, 4))
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_thousands_of_damaged_files_end_in_an_error_that_names_them(make, seed, tmp_path):
    assert fuzz(make, tmp_path, count=300, seed=seed).keys() <= ENDINGS
