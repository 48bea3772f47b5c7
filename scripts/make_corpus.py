#!/usr/bin/env python3
"""Makes the corpus: small random models of every family, by every route, in every quantization.

    pip install '.[fixtures,test]'
    python scripts/make_corpus.py OUT [--families llama bert] [--routes dynamo optimum]

OUT/<family>-<route>[-<quantization>]/ holds the ONNX file or files of a cell, or failed.txt, the
error of an exporter that does not take the family. What exists is left as it is. Routes of
onnxruntime-genai's model builder run where the interpreter has the peer-models extra.
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
FAILED = "failed.txt"
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

    from corpus import formats, optimizations, quantizations
    from corpus.transforms import TRANSFORMS

    assert formats and optimizations and quantizations, "importing them fills the table"
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
    except Exception as error:
        words = f"{type(error).__name__}: {error}".strip()
        (scratch / FAILED).write_text(f"{words}\n\n{traceback.format_exc()}")
    scratch.rename(folder)
    state = "failed" if (folder / FAILED).exists() else "made"
    print(f"{state:<7} {folder.name}", flush=True)


def main() -> None:
    from corpus.families import FAMILIES
    from corpus.routes import ROUTES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--routes", nargs="+", choices=ROUTES)
    parser.add_argument("--transforms", metavar="PATTERN", help="make only such transformed cells")
    arguments = parser.parse_args()
    here = {extra for extra, module in MODULES.items() if importlib.util.find_spec(module)}
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
    if not arguments.routes:
        make_transformed("*", arguments.out)


if __name__ == "__main__":
    main()
