"""Opens mutated copies of a bundle; run as a program, so that a crash ends it and not the tests.

    python -m tests.runtime.open_mutants BUNDLE WORK_FOLDER SEED COUNT

Prints how often each outcome happened as JSON. A mutant must be refused with an SlmError or compute
exactly what the original does.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slmtvm.errors import SlmError
from slmtvm.runtime import load
from slmtvm.runtime.interface import SKIP_CHECKSUM, Library, Options

TOKENS = [1, 2, 3, 4, 5]
_HEADER_BYTES = 64
_MOST_FLIPS = 4
_INTERESTING = [
    "null",
    "-1",
    "1e999",
    '""',
    "[]",
    "{}",
    '"../../x"',
    "99999999999999999999",
    "true",
]


def mutate_bytes(rng: random.Random, content: bytes, *, end: int | None = None) -> bytes:
    """Some bytes before ``end`` changed, or a piece cut out, repeated or cut off."""
    changed = bytearray(content)
    end = end or len(changed)
    match rng.randrange(6):
        case 0:
            del changed[rng.randrange(end) :]
        case 1:
            start = rng.randrange(end)
            del changed[start : start + rng.randint(1, 100)]
        case 2:
            start = rng.randrange(end)
            piece = bytes(changed[start : start + rng.randint(1, 100)])
            changed[start:start] = piece
        case _:
            for _ in range(rng.randint(1, _MOST_FLIPS)):
                changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def mutate_manifest(rng: random.Random, content: bytes) -> bytes:
    """One value replaced, one line dropped, repeated or swapped with another."""
    lines = content.decode().splitlines(keepends=True)
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            key, colon, rest = lines[at].partition(": ")
            comma = "," if rest.rstrip().endswith(",") else ""
            lines[at] = f"{key}{colon}{rng.choice(_INTERESTING)}{comma}\n"
        case 1:
            del lines[at]
        case 2:
            lines.insert(other, lines[at])
        case _:
            lines[at], lines[other] = lines[other], lines[at]
    return "".join(lines).encode()


def mutant(rng: random.Random, files: dict[str, bytes], library: str) -> tuple[str, bytes | None]:
    """The file to replace in a copy of the bundle and its new content; None removes it."""
    choices: list[tuple[str, Callable[[bytes], bytes | None]]] = [
        ("weights.bin", lambda b: mutate_bytes(rng, b)),
        ("weights.bin", lambda b: mutate_bytes(rng, b, end=_HEADER_BYTES)),
        ("manifest.json", lambda b: mutate_bytes(rng, b)),
        ("manifest.json", lambda b: mutate_manifest(rng, b)),
        ("manifest.json", lambda b: mutate_manifest(rng, b)),
        (library, lambda b: mutate_bytes(rng, b)),
        (rng.choice(sorted(files)), lambda _: None),
    ]
    name, change = rng.choice(choices)
    return name, change(files[name])


def open_by_c_interface(library: Library, folder: Path) -> str:
    """Past Python's own checks: the library alone must survive its weights."""
    model, session = ctypes.c_void_p(), ctypes.c_void_p()
    options = Options(ctypes.sizeof(Options), 1, SKIP_CHECKSUM)
    tokens = np.array(TOKENS, np.int32)
    try:
        library.call("slm_open", os.fsencode(folder), ctypes.byref(options), ctypes.byref(model))
    except SlmError:
        return "refused by the library"
    library.call("slm_session_new", model, ctypes.byref(session))
    library.call("slm_eval", session, tokens.ctypes.data, tokens.size, None)
    library.call("slm_session_free", session)
    library.call("slm_close", model)
    return "opened unchecked"


def main(bundle: Path, work: Path, seed: int, count: int) -> Counter[str]:
    rng = random.Random(seed)
    files = {
        str(p.relative_to(bundle)): p.read_bytes() for p in sorted(bundle.rglob("*")) if p.is_file()
    }
    with load(bundle) as session:
        wanted = session.eval(TOKENS)
        library_file = f"lib/{session.model.target}.so"
    library = Library(bundle / library_file)
    folder = work / "mutant.slm"
    shutil.copytree(bundle, folder)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        name, content = mutant(rng, files, library_file)
        if content == files[name]:
            continue
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        try:
            with load(folder) as session:
                assert np.array_equal(session.eval(TOKENS), wanted), f"{name} changed the result"
            outcomes[f"{name} works"] += 1
        except SlmError as error:
            where = "" if str(folder) in str(error) else ", without saying where"
            outcomes[f"{name} refused{where}"] += 1
        if name == "weights.bin":
            outcomes[open_by_c_interface(library, folder)] += 1
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(files[name])
    return outcomes


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(found))
