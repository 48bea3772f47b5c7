"""Compile an ONNX file into a bundle for one or more targets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.cli.arguments import positive
from slmtvm.errors import AccuracyError

if TYPE_CHECKING:
    from slmtvm.bundle import Bundle

INACCURATE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--target", action="append", metavar="NAME",
        help="what to compile for: a name of `slmtvm targets`, a TOML file, or host (default); "
        "may be given several times",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, help="the bundle, x.slm")
    parser.add_argument(
        "--context", type=positive, help="tokens that a session holds (default: the model's most)"
    )
    parser.add_argument(
        "--source-context", type=positive, metavar="TOKENS",
        help="the most tokens of an encoder-decoder's source (default: the model's most, up to "
        "512)",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=("f16", "f32", "int8"),
        help="how the KV cache holds keys and values (default: f16 where the CPU converts it in "
        "one instruction, else f32)",
    )  # fmt: skip
    parser.add_argument(
        "--activations", choices=("int8", "file", "f32"), default="int8",
        help="what float activations that meet integer weights are computed in: int8 (the "
        "default), file (int8 only where the file says so) or f32",
    )  # fmt: skip
    parser.add_argument(
        "--mask", choices=("none", "arbitrary"), default="none",
        help="arbitrary: sequences may have hidden tokens anywhere, as the file's attention_mask "
        "has them (default: none)",
    )  # fmt: skip
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        "--check-tokens", type=Path, metavar="FILE",
        help="compare what was made with onnxruntime on this text, or on token ids in a .npy file "
        "(default: 64 tokens, half at random, half those with the largest embeddings); exit code "
        f"{INACCURATE} and no bundle where it differs by more than verify allows",
    )  # fmt: skip
    check.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare with onnxruntime"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json to include (default: the model's own)"
    )


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.compiler import compile_model

    try:
        with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None) as bar:
            bundle = compile_model(
                options.model,
                options.target or ["host"],
                output=options.output,
                context=options.context,
                source_context=options.source_context,
                tokenizer=options.tokenizer,
                kv=options.kv,
                activations=options.activations,
                mask=options.mask,
                check=options.check,
                check_tokens=options.check_tokens,
                progress=bar.set_description_str,
            )
    except AccuracyError as error:
        if options.debug:
            raise
        print(f"slmtvm: error: {error}", file=sys.stderr)
        return INACCURATE
    print(_summary(bundle))
    return 0


def _summary(bundle: Bundle) -> str:
    model, weights = bundle.manifest.model, bundle.manifest.weights
    mask = "" if model["mask"] == "none" else f", masks ({model['mask']})"
    kind = f"{model['family']} {model['kind']}"
    lines = [
        f"{bundle.path}: {kind}, context {model['context']} tokens{mask}",
        f"  {'weights':24} {_size(weights.bytes)}",
    ]
    for name, target in bundle.manifest.targets.items():
        lines.append(f"  {name:24} {_size(target.library.bytes)}")
    if record := bundle.manifest.extra.get("check"):
        from slmtvm.verify.check import check_line

        lines.append(f"  {check_line(record)}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1000:>10,.1f} kB"
