"""Mark the weights of a quantized ONNX file by a secret key, and find the mark again."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True
    )  # fmt: skip
    embed = actions.add_parser("embed", help="write a copy of an ONNX file with the mark")
    embed.add_argument("model", type=Path, help="the quantized ONNX file")
    embed.add_argument("-o", "--output", type=Path, required=True, help="the marked ONNX file")
    detect = actions.add_parser(
        "detect", help="say what weights tell of the key; ends with 1 where the mark is not there"
    )
    detect.add_argument(
        "path", type=Path, help="an ONNX file, a bundle (x.slm), or any file that holds weights"
    )
    for action in (embed, detect):
        action.add_argument(
            "--key", type=Path, required=True, metavar="FILE",
            help="the secret: 16 bytes at least, such as head -c 32 /dev/urandom writes",
        )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from slmtvm.watermark import detect, embed, read_key

    key = read_key(options.key)
    if options.action == "embed":
        marked = embed(options.model, key, options.output)
        if not options.quiet:
            print(
                f"{options.output}: {marked.changed} of {marked.scales} scales changed, by "
                f"{marked.largest:.2%} at most; by chance p = 10^{marked.evidence.log10_p:.0f}"
            )
        return 0
    evidence = detect(options.path, key)
    if not options.quiet:
        print(
            f"{options.path}: {evidence.right} of {evidence.votes} are as the key wants them; by "
            f"chance p = 10^{evidence.log10_p:.1f}: "
            f"the mark is {'there' if evidence.found else 'not there'}"
        )
    return 0 if evidence.found else 1
