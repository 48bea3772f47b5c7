"""Every form of the demo model that the tests import, each as its exporter and quantizer write it.

    model_path("int4_asymmetric")  ->  a file in a cache that all test processes share

Only onnx, onnxruntime and numpy are needed: torch's work is in the committed skeletons.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx

from tests.models import weights
from tests.models.pycode import DEMO
from tests.models.quantizers import fold_tied_head, quantize_int4, quantize_int8

ASSETS = Path(__file__).parent / "pycode-6m"
WEIGHTS = ASSETS / "weights.npz"
NO_CACHE = ASSETS / "no_cache.skeleton.onnx"  # torch.onnx.export(dynamo=True)
WITH_PAST = ASSETS / "with_past.skeleton.onnx"  # optimum, text-generation-with-past


def _exported(skeleton: Path) -> onnx.ModelProto:
    model = onnx.load(skeleton)
    weights.fill(model, weights.load(WEIGHTS))
    return model


def _float32(path: Path) -> None:
    onnx.save(_exported(NO_CACHE), path)


def _with_past(path: Path) -> None:
    onnx.save(_exported(WITH_PAST), path)


def _int4(path: Path) -> None:
    onnx.save(quantize_int4(fold_tied_head(_exported(NO_CACHE))), path)


def _int4_asymmetric(path: Path) -> None:
    onnx.save(quantize_int4(fold_tied_head(_exported(NO_CACHE)), symmetric=False), path)


def _int4_float_activations(path: Path) -> None:
    onnx.save(quantize_int4(fold_tied_head(_exported(NO_CACHE)), accuracy_level=None), path)


def _int4_float_head(path: Path) -> None:
    onnx.save(quantize_int4(_exported(NO_CACHE)), path)


def _with_past_int4(path: Path) -> None:
    onnx.save(quantize_int4(_exported(WITH_PAST)), path)


def _int8(path: Path, *, per_channel: bool = False, fold: bool = True) -> None:
    model = _exported(NO_CACHE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.onnx"
        onnx.save(fold_tied_head(model) if fold else model, source)
        quantize_int8(source, path, per_channel=per_channel)


def _int8_per_channel(path: Path) -> None:
    _int8(path, per_channel=True)


def _int8_tied_head(path: Path) -> None:
    _int8(path, fold=False)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "float32": _float32,
    "int4": _int4,  # symmetric, int8 activations (accuracy_level 4)
    "int4_asymmetric": _int4_asymmetric,  # with zero points, int8 activations
    "int4_float_activations": _int4_float_activations,  # symmetric, no accuracy_level
    "int4_float_head": _int4_float_head,  # the quantizer on the exporter's file as it is
    "int8": _int8,  # dynamic, a scale for each tensor
    "int8_per_channel": _int8_per_channel,
    "int8_tied_head": _int8_tied_head,  # the quantizer on the exporter's file as it is
    "with_past": _with_past,
    "with_past_int4": _with_past_int4,  # symmetric, int8 activations
}
DEMO_FORM = "demo"  # the shipped file: int4 with an int4 embedding
FORMS = (*_BUILDERS, DEMO_FORM)


def default_cache() -> Path:
    """A folder that outlives the test run; forms built from other assets get another one."""
    digest = hashlib.sha256()
    code = (
        Path(__file__).with_name(f"{name}.py")
        for name in ("forms", "quantizers", "weights", "export_minilm")
    )
    sources = [WEIGHTS, NO_CACHE, WITH_PAST, *code]
    for source in sources:
        digest.update(source.read_bytes())
    digest.update(f"{version('onnx')} {version('onnxruntime')}".encode())
    return cache_base() / digest.hexdigest()[:16]


def cache_base() -> Path:
    """The folder of all models that tests build or unpack."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "slmtvm" / "test-models"


def model_path(form: str, cache: Path | None = None) -> Path:
    """The ONNX file of one of FORMS, built in ``cache`` (the shared one by default) if need be."""
    if form == DEMO_FORM:
        return DEMO / "model_int4.onnx"
    folder = cache or default_cache()
    path = folder / f"{form}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            _BUILDERS[form](built)
            built.replace(path)  # whole or not at all: other test processes may look for it
    return path
