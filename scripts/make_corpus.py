#!/usr/bin/env python3
"""Makes the corpus: small random models of every family, by every route, in every quantization.

    pip install '.[fixtures,test]'
    python scripts/make_corpus.py OUT [--families llama bert] [--routes dynamo optimum]

OUT/<family>-<route>[-<quantization>]/ holds the ONNX file or files of a cell, or failed.txt: the
error of an exporter that does not take the family, or of onnxruntime where it cannot run the file.
What exists is left as it is. Routes of onnxruntime-genai's model builder run where the interpreter
has the peer-models extra, those of older releases where it has what their files in
scripts/corpus/requirements list. --pack FOLDER packs the cells that are committed, for
tests/models/corpus.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import multiprocessing
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from corpus.selection import FAILED

MODULES = {"fixtures": "optimum", "peer-models": "onnxruntime_genai"}


def make_family(name: str, routes: list[str], out: Path) -> None:
    """All of a family's routes, in a process of its own."""
    import warnings

    import torch
    from corpus.families import FAMILIES
    from corpus.routes import ROUTES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family = FAMILIES[name]
    for route in (ROUTES[r] for r in routes):
        folder = out / f"{name}-{route.name}"
        if folder.exists() or not route.takes(family):
            continue
        _write(folder, partial(route.write, family))


def make_transformed(only: str, out: Path) -> None:
    """All transforms of the cells that there are, in the tables' order, until nothing is new."""
    import warnings

    from corpus import formats, layers, optimizations, ports, quantizations
    from corpus.transforms import TRANSFORMS

    registered = (formats, layers, optimizations, ports, quantizations)
    assert all(registered), "importing them fills the table"
    warnings.simplefilter("ignore")
    new = True
    while new:
        new = False
        for change in TRANSFORMS:
            for source in change.sources:
                files = sorted((out / source).glob("*.onnx"))
                folder = out / f"{source}-{change.name}"
                if not files or folder.exists() or not fnmatch.fnmatch(folder.name, only):
                    continue
                _write(folder, partial(_each_file, change.write, files))
                new = True


def _each_file(write: Callable[[Path, Path], None], files: list[Path], folder: Path) -> None:
    for file in files:
        write(file, folder / file.name)


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder, which appears whole; it says why where there is nothing to put in it."""
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        _try_files(scratch, folder.name)
    except Exception as error:
        words = f"{type(error).__name__}: {error}".strip()
        shutil.rmtree(scratch)
        scratch.mkdir()
        (scratch / FAILED).write_text(f"{words}\n\n{traceback.format_exc()}")
    scratch.rename(folder)
    state = "failed" if (folder / FAILED).exists() else "made"
    print(f"{state:<7} {folder.name}", flush=True)


def _try_files(folder: Path, cell: str) -> None:
    """Raise SlmError where onnxruntime cannot run a file: there is nothing to compare with.

    The model builder's environment has no compiler, and its files are not tried here.
    """
    if importlib.util.find_spec("tvm") is None:
        return
    from corpus.families import FAMILIES, final_token
    from corpus.heads import HEADS
    from corpus.inputs import LEAST_VOCAB_SIZE, ended, source_of, token_sequences
    from corpus.oracle import wanted_rows
    from corpus.selection import is_model, split_name

    from slmtvm.verify import Reference

    family = FAMILIES[split_name(cell).family]
    head = HEADS.get(split_name(cell).head)
    for path in (p for p in folder.iterdir() if is_model(p.name)):
        kind = "encoder" if path.name.startswith("encoder") else family.kind
        tokens = [ended(ids, final_token(cell)) for ids in token_sequences(LEAST_VOCAB_SIZE)]
        if head is not None:
            reference = Reference(path)
            rows = [value for ids in tokens for value in reference.run(ids, head.outputs)]
        else:
            rows = wanted_rows(path, tokens, source_of(kind), stepwise=False)
        if not all(np.isfinite(row).all() for row in rows):
            raise ArithmeticError("onnxruntime computes NaN or infinity from the file")


def main() -> None:
    from corpus.families import FAMILIES
    from corpus.releases import RELEASES
    from corpus.routes import ROUTES
    from corpus.selection import pack

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--routes", nargs="+", choices=ROUTES)
    parser.add_argument("--transforms", metavar="PATTERN", help="make only such transformed cells")
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="write the selection's archives"
    )
    arguments = parser.parse_args()
    here = {extra for extra, module in MODULES.items() if importlib.util.find_spec(module)}
    here = {release.environment for release in RELEASES if release.is_here} or here
    if arguments.pack:
        pack(arguments.out, arguments.pack)
        return
    if arguments.transforms:
        make_transformed(arguments.transforms, arguments.out)
        return
    routes = arguments.routes or [r.name for r in ROUTES.values() if r.environment in here]
    arguments.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for family in arguments.families:
        process = context.Process(target=make_family, args=(family, routes, arguments.out))
        process.start()
        process.join()
        if process.exitcode != 0:
            print(f"crashed {family}: exit code {process.exitcode}", flush=True)
    if not arguments.routes and "fixtures" in here:
        make_transformed("*", arguments.out)


if __name__ == "__main__":
    main()
