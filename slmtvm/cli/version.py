"""``slmtvm --version``: of slmtvm, of what it compiles and compares with, of its bundles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from slmtvm.bundle.manifest import FORMAT

_PACKAGES = (
    ("TVM", "apache-tvm"),
    ("onnxruntime", "onnxruntime"),
    ("onnx", "onnx"),
    ("tokenizers", "tokenizers"),
    ("zig", "ziglang"),
)


class ShowVersion(argparse.Action):
    """Prints ``versions()`` and ends, without importing what it names."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(versions())
        parser.exit()


def versions() -> str:
    """A line for slmtvm, and one for what it works with."""
    found = [f"{title} {_version(package)}" for title, package in _PACKAGES]
    return f"slmtvm {_version('slmtvm')}\n{', '.join(found)}, bundle format {FORMAT}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
