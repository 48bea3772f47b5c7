#!/usr/bin/env python3
"""What a constraint costs: microseconds a token, beside those of computing and choosing it freely.

    scripts/bench_constraint.py pycode.slm [--json-schema FILE] [--tokens 48] [--rounds 15]

A text is written under the constraint, greedily and drawn; at each token the choice with it and the
one without take turns, through the C interface as Python calls it. The least of the rounds counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from contextlib import closing
from pathlib import Path

import slmtvm
from slmtvm.runtime import Session
from slmtvm.runtime.constraint import Constraint
from slmtvm.runtime.interface import TEXT_IS_OVER
from slmtvm.runtime.sampling import Choosing

_SCHEMA = {
    "type": "object",
    "properties": {
        "go": {"enum": ["left", "right", "back"]},
        "metres": {"type": "number", "minimum": 0, "maximum": 20},
        "say": {"type": "string"},
    },
    "required": ["go", "metres", "say"],
}
_PROMPT = "command = "


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json-schema", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    schema = json.loads(options.json_schema.read_text()) if options.json_schema else _SCHEMA
    began = time.perf_counter()
    compiled = slmtvm.constrain(options.bundle, json_schema=schema)
    seconds, size = time.perf_counter() - began, len(compiled.content) / 1000
    print(f"compiled in {seconds:.2f} s: {size:.0f} kB, {compiled.states} states")
    with (
        slmtvm.load(options.bundle) as session,
        closing(session.constraint(compiled)) as constraint,
    ):
        for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
            rounds = [
                _round(session, constraint, options.tokens, temperature)
                for _ in range(options.rounds)
            ]
            # By token: computing it, choosing it freely, choosing it under the constraint.
            least = [
                [min(r[i][k] for r in rounds) for i in range(len(rounds[0]))] for k in range(3)
            ]
            computed, free, held = (1e6 * sum(column) / len(column) for column in least)
            share = (held - free) / (computed + free)
            print(
                f"{name}: {computed:.1f} us to compute a token, {free:.1f} to choose it, "
                f"{held:.1f} under the constraint: {100 * share:+.1f}%"
            )


def _round(
    session: Session, constraint: Constraint, most: int, temperature: float
) -> list[tuple[float, float, float]]:
    """Of each token of a text: seconds to compute it, to choose it freely, and constrained."""
    call, handle = session._call, session._handle
    free = Choosing(temperature=temperature, seed=1).struct()
    held = Choosing(temperature=temperature, seed=1).struct()
    held.constraint = constraint.handle
    session.reset()
    tokens = session.tokenizer.encode(_PROMPT).ids
    session.eval(tokens[:-1])
    token, found = ctypes.c_int32(tokens[-1]), []
    for count in range(most):
        begin = time.perf_counter()
        call("slm_eval", handle, ctypes.addressof(token), 1, None)
        computed = time.perf_counter()
        call("slm_sample", handle, ctypes.byref(free))
        chosen = time.perf_counter()
        held.most = most - count
        token.value = call("slm_sample", handle, ctypes.byref(held))
        held.state = state = constraint.next(held.state, token.value)
        over = state == TEXT_IS_OVER or constraint.is_over(state)
        found.append((computed - begin, chosen - computed, time.perf_counter() - chosen))
        if over:
            break
    return found


if __name__ == "__main__":
    main()
