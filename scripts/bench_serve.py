#!/usr/bin/env python3
"""Time to the first token that slm-serve takes, with a prefix that a session has and without.

    scripts/bench_serve.py pycode.slm [--prefix 900] [--new 16] [--rounds 15] [--threads 1]

Three kinds of prompt take turns: the new tokens alone, the prefix with new tokens behind it, and as
many tokens that nobody has seen. Milliseconds from the request to the first event with text.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import time
from pathlib import Path

from slmtvm.runtime.serving import server_program


def first_token(port: int, tokens: list[int]) -> tuple[float, int]:
    """Seconds to the first event of an answer, and how many tokens of the prompt were there."""
    body = {
        "prompt": tokens, "max_tokens": 2, "temperature": 0, "stream": True, "logprobs": 0,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    content = json.dumps(body).encode()
    begin = time.perf_counter()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    line = answer.readline()
    seconds = time.perf_counter() - begin
    assert line.startswith(b"data: {"), line
    rest = answer.read().decode()
    cached = re.search(r'"cached_tokens":(\d+)', rest)
    assert cached, rest
    return seconds, int(cached[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prefix", type=int, default=900)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, default=1, help="of the server (default: its own, 1)"
    )
    options = parser.parse_args()
    command = [
        server_program(options.bundle), options.bundle,
        "--port", "0", "--sessions", "3", "--threads", str(options.threads),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+)$", process.stdout.readline().strip())
            assert found
            measure(int(found[1]), options)
        finally:
            process.terminate()


def measure(port: int, options: argparse.Namespace) -> None:
    r = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [r.randrange(300, 4000) for _ in range(count)]

    prefix = tokens(options.prefix)
    first_token(port, prefix)
    kinds = {"new tokens alone": [], "behind the prefix": [], "all unseen": []}
    for _ in range(options.rounds):
        for kind, times in kinds.items():
            before = {"new tokens alone": [], "behind the prefix": prefix}.get(kind)
            given = (tokens(options.prefix) if before is None else before) + tokens(options.new)
            seconds, cached = first_token(port, given)
            assert (cached >= options.prefix) == (before is prefix), (kind, cached)
            times.append(seconds)
    for kind, times in kinds.items():
        print(f"{kind:18} {1e3 * statistics.median(times):8.2f} ms, least {1e3 * min(times):.2f}")
    for name, of in (("medians", statistics.median), ("least", min)):
        bare, shared, _ = map(of, kinds.values())
        print(f"prefix over bare   {shared / bare:8.2f} ({name})")


if __name__ == "__main__":
    main()
