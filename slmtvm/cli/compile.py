"""Compile an ONNX file into a bundle for one or more targets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmtvm.cli.arguments import CacheTypes, positive
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
        "--encoder", type=Path, metavar="FILE",
        help="the ONNX file of the encoder that a decoder's file reads (default: "
        "encoder_model.onnx beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--kv", choices=CacheTypes(("f16", "f32", "int8", "int4")),
        metavar="{f16,f32,int8,int4,rank:R[,TYPE]}",
        help="how the KV cache holds keys and values (default: f16 where the CPU converts it in "
        "one instruction, else f32); rank:R: R numbers of each head, its best projections, of "
        "that type",
    )  # fmt: skip
    parser.add_argument(
        "--kv-calibration", type=Path, metavar="FILE",
        help="a text, or token ids in a .npy file, from which is learned what a cache of rank:R "
        "keeps",
    )  # fmt: skip
    parser.add_argument(
        "--kv-keep", choices=("window", "all"), default="window",
        help="what the KV cache of layers with a sliding window holds: window, what they can still "
        "see, so that sessions seek back no further (default), or all positions",
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
    parser.add_argument(
        "--sparse", default="auto", metavar="auto|off|FORMAT",
        help="auto: layers whose weights are zero in patterns skip these where that is expected to "
        "be faster (default); off: they do not; a format (blocks, 4of8, 4of16, 8of16 of int8, 2of4 "
        "of int4, rows of float32): every layer that it fits takes it, others stay dense; results "
        "are the same",
    )  # fmt: skip
    parser.add_argument(
        "--exit", type=_names, default=[], metavar="LAYER,...",
        help="a decoded token may end after so many layers, with the model's own head, or at an "
        "output of the file with logits of its own (by name), where these are sure enough",
    )  # fmt: skip
    parser.add_argument(
        "--exit-calibration", type=Path, metavar="FILE",
        help="a text, or token ids in a .npy file, from which is learned how sure is enough",
    )  # fmt: skip
    parser.add_argument(
        "--exit-agreement", type=float, default=0.99, metavar="PART",
        help="of the calibration tokens that end at an exit, how many must go on as after all "
        "layers (default 0.99)",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-persistent", action="store_true",
        help="on a GPU, compute a decoded token by one kernel instead of a graph of them; results "
        "are the same",
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
        "--outputs", type=_names, metavar="A,B",
        help="the file's outputs to compile, by name (default: all of floats but the cache; of "
        "a decoder's, not those that others are made of)",
    )  # fmt: skip
    parser.add_argument(
        "--records", type=Path, metavar="FILE",
        help="what `slmtvm tune` measured: kernels take the fastest settings known for the target "
        "(default: the records that come with slmtvm; an empty file stands for none)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer to include (default: the model's own)"
    )


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.compiler import compile_model

    notes: list[str] = []
    try:
        with tqdm(
            bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None
        ) as bar:
            bundle = compile_model(
                options.model,
                options.target or ["host"],
                output=options.output,
                context=options.context,
                source_context=options.source_context,
                tokenizer=options.tokenizer,
                kv=options.kv,
                kv_calibration=options.kv_calibration,
                kv_keep=options.kv_keep,
                activations=options.activations,
                mask=options.mask,
                encoder=options.encoder,
                outputs=options.outputs,
                sparse=options.sparse,
                exits=options.exit,
                exit_calibration=options.exit_calibration,
                exit_agreement=options.exit_agreement,
                cuda_persistent=options.cuda_persistent,
                check=options.check,
                check_tokens=options.check_tokens,
                records=options.records,
                progress=bar.set_description_str,
                note=notes.append,
            )
    except AccuracyError as error:
        if options.debug:
            raise
        print(f"slmtvm: error: {error}", file=sys.stderr)
        return INACCURATE
    if not options.quiet:
        print(_summary(bundle))
        for note in notes:
            print(f"  note: {note}")
        if bundle.manifest.tokenizer is None:
            print(
                f"slmtvm: warning: {bundle.path} has no tokenizer, and takes token ids only: there "
                "is none beside the model, and --tokenizer names none",
                file=sys.stderr,
            )
    return 0


def _summary(bundle: Bundle) -> str:
    from slmtvm.plan.setup import Setup

    model, weights = bundle.manifest.model, bundle.manifest.weights
    mask = "" if model["mask"] == "none" else f", masks ({model['mask']})"
    kind = f"{model['family']} {model['kind']}"
    lines = [
        f"{bundle.path}: {kind}, context {model['context']} tokens{mask}",
        *_output_lines(model),
        f"  {'weights':24} {_size(weights.bytes)}",
    ]
    targets = bundle.manifest.targets.values()
    if state := max((t.memory["state"] for t in targets), default=0):
        window = ", of windows where layers have one" if model["kv_window"] else ""
        lines.append(f"  {'KV cache':24} {_size(state)} a session{window}")
    if model.get("kv_beyond_f16") and model["kv"] == "f16":
        lines.append("  keys or values beyond float16 are cut off: --kv f32 keeps them")
    elif model.get("kv_beyond_f16") and model["kv"] == "f32":
        lines.append("  the KV cache is float32: keys or values are beyond float16")
    for name, target in bundle.manifest.targets.items():
        lines.append(f"  {name:24} {_size(target.library.bytes)}")
    for name, chosen in bundle.manifest.extra.get("tuning", {}).items():
        near = sum(kernel["origin"] == "nearest" for kernel in chosen)
        confirmed = sum(kernel["confirmed"] for kernel in chosen)
        static = sum(kernel["origin"] == "static" for kernel in chosen)
        lines.append(
            f"  {name}: {len(chosen)} kinds of kernels as tuned, {near} of them by a near shape, "
            f"{confirmed} confirmed in a whole model"
            + (f", {static} never measured" if static else "")
            + (", by records that come with slmtvm" if any(k["shipped"] for k in chosen) else "")
        )
    for name, setup in bundle.manifest.extra.get("setup", {}).items():
        lines.append(f"  {name}: {Setup.from_json(setup)}")
    if record := bundle.manifest.extra.get("check"):
        from slmtvm.verify.check import check_line

        lines.append(f"  {check_line(record)}")
    return "\n".join(lines)


def _output_lines(model: dict[str, Any]) -> Iterator[str]:
    """The outputs, where they are not a language model's logits alone, and those left out."""
    outputs = model["outputs"]
    if len(outputs) > 1 or outputs[0]["features"] != model["vocab_size"] or outputs[0]["pooled"]:
        for output in outputs:
            of = "the whole text" if output["pooled"] else "each token"
            yield f"  {'output':24} {output['name']}: {output['features']} numbers for {of}"
    for name, reason in model["left_out"].items():
        yield f"  {'left out':24} {name}: {reason}"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _size(count: int) -> str:
    return f"{count / 1000:>10,.1f} kB"
