"""slmtvm compiles small language models from ONNX into bundles that run anywhere.

    bundle = slmtvm.compile("model.onnx", ["host"], output="model.slm")
    session = slmtvm.load("model.slm")

Every name below is imported when it is first used, so that running a bundle needs no compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmtvm.bundle import Bundle
    from slmtvm.compiler import compile_model as compile
    from slmtvm.constrain import constrain
    from slmtvm.errors import (
        AccuracyError,
        BundleError,
        ConstraintError,
        DeviceError,
        InternalError,
        InvalidModelError,
        SignatureError,
        SlmError,
        TargetError,
        UnsupportedOpError,
    )
    from slmtvm.inspect import inspect
    from slmtvm.matrix.compile import compile_matrix
    from slmtvm.prune import prune
    from slmtvm.quantize import quantize
    from slmtvm.runtime import Session, load
    from slmtvm.target import Target
    from slmtvm.tuning.tune import tune
    from slmtvm.verify import verify

# public name -> module, name in it
_PUBLIC = {
    "AccuracyError": ("slmtvm.errors", "AccuracyError"),
    "Bundle": ("slmtvm.bundle", "Bundle"),
    "BundleError": ("slmtvm.errors", "BundleError"),
    "ConstraintError": ("slmtvm.errors", "ConstraintError"),
    "DeviceError": ("slmtvm.errors", "DeviceError"),
    "InternalError": ("slmtvm.errors", "InternalError"),
    "InvalidModelError": ("slmtvm.errors", "InvalidModelError"),
    "Session": ("slmtvm.runtime", "Session"),
    "SignatureError": ("slmtvm.errors", "SignatureError"),
    "SlmError": ("slmtvm.errors", "SlmError"),
    "Target": ("slmtvm.target", "Target"),
    "TargetError": ("slmtvm.errors", "TargetError"),
    "UnsupportedOpError": ("slmtvm.errors", "UnsupportedOpError"),
    "constrain": ("slmtvm.constrain", "constrain"),
    "compile": ("slmtvm.compiler", "compile_model"),
    "compile_matrix": ("slmtvm.matrix.compile", "compile_matrix"),
    "inspect": ("slmtvm.inspect", "inspect"),
    "load": ("slmtvm.runtime", "load"),
    "prune": ("slmtvm.prune", "prune"),
    "quantize": ("slmtvm.quantize", "quantize"),
    "tune": ("slmtvm.tuning.tune", "tune"),
    "verify": ("slmtvm.verify", "verify"),
}

__all__ = [
    "AccuracyError",
    "Bundle",
    "BundleError",
    "ConstraintError",
    "DeviceError",
    "InternalError",
    "InvalidModelError",
    "Session",
    "SignatureError",
    "SlmError",
    "Target",
    "TargetError",
    "UnsupportedOpError",
    "compile",
    "compile_matrix",
    "constrain",
    "inspect",
    "load",
    "prune",
    "quantize",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Package(ModuleType):
    """Lets ``slmtvm.verify`` be the function although a submodule has the same name.

    Importing a submodule binds it to its package; for the public names that is left out.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
