"""Show what the compiler recognises in an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmtvm.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--context", type=positive, help="tokens that a session is to hold, as for compile"
    )
    parser.add_argument(
        "--encoder", type=Path, metavar="FILE",
        help="the ONNX file of the encoder that a decoder's file reads (default: "
        "encoder_model.onnx beside it)",
    )  # fmt: skip
    parser.add_argument("--layers", action="store_true", help="list every layer that has weights")
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="write the graph, its weights replaced by their shapes, to send with a problem",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.inspect import inspect, layer_table, write_report

    if options.report:
        write_report(options.model, options.report)
    inspection = inspect(options.model, context=options.context, encoder=options.encoder)
    print(inspection)
    if options.layers:
        print(layer_table(inspection.weights))
    if options.report:
        print(f"{options.report}: the graph without the values of its weights")
    return 0
