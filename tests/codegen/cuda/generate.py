"""Runs a bundle's library for a target, and writes what it computes, as an .npz: logits, and
tokens.

python -m tests.codegen.cuda.generate BUNDLE TARGET FILE TOKEN...

TARGET may be "best", what the bundle chooses itself, "again": the same, and calls that fail are
made a second time, or "lives": the same until one fails for the second time, then the CPU's. Prints
the target that was chosen, why no GPU was, and the errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from slmtvm.errors import DeviceError, SlmError
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session

CPU = "x86-64-v3"


def main() -> None:
    bundle, target, path, *words = sys.argv[1:]
    tokens = [int(word) for word in words]
    if target == "lives":
        outlive(bundle, tokens)
        target = CPU
    model = Model(bundle, target=None if target in ("best", "again") else target)
    print(model.target, model.how.get("no_gpu", "-"))

    def tried(call: Callable[[list[int]], np.ndarray], given: list[int]) -> np.ndarray:
        try:
            return call(given)
        except DeviceError as error:
            if target != "again":
                raise
            print(error)
            return call(given)

    if model.info["kind"] != "decoder":
        np.savez(path, **encoded(model, tokens))
        model.close()
        return
    session, other = Session(model), Session(model)
    found = {"prompt": tried(session.eval, tokens), "next": tried(session.eval, [7])}
    found["other"] = tried(other.eval, tokens[:2])
    session.seek(len(tokens) - 3)
    found["all"] = tried(session.eval_all, tokens[-3:])
    found["after"] = tried(session.eval, [9])
    found["tokens"] = np.array([*session.generate([3], 5), other.sample()], np.int32)
    np.savez(path, **found)
    session.close()
    other.close()
    model.close()


def outlive(bundle: str, tokens: list[int]) -> None:
    """Uses the GPU until it has failed twice."""
    model = Model(bundle)
    print(model.target)
    session = Session(model)
    for _ in range(2):
        try:
            session.eval(tokens)
        except DeviceError as error:
            print(f"DeviceError: {error}")
    session.close()
    model.close()


def encoded(model: Model, tokens: list[int]) -> dict[str, np.ndarray]:
    """What an encoder makes of all tokens and of a few; an encoder-decoder of a text, too."""
    session = Session(model)
    found = {"all": session.encode(tokens), "few": session.encode(tokens[:5])}
    if model.info["kind"] != "encoder":
        found["prompt"], found["next"] = session.eval(tokens[:3]), session.eval([7])
        found["tokens"] = np.array(list(session.generate([3], 5)), np.int32)
    session.close()
    return found


if __name__ == "__main__":
    try:
        main()
    except SlmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
