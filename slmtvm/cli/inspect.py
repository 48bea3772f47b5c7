"""Show what the compiler recognises in an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file")


def run(options: argparse.Namespace) -> int:
    from slmtvm.inspect import inspect

    print(inspect(options.model))
    return 0
