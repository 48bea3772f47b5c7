"""Requests that nobody well-meaning sends, made at random."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/classify", "/tokenize",
    "/detokenize",
    "/v1/models", "/v1/models/x", "/healthz", "/metrics", "/", "/v1/completions?x=1", "*",
)  # fmt: skip
_WORDS = (
    "prompt", "messages", "role", "content", "user", "system", "input", "tokens", "stop", "stream",
    "temperature", "max_tokens", "logprobs", "seed", "model", "type", "text", "encoding_format",
    "logit_bias", "response_format", "json_schema", "schema", "name", "presence_penalty", "7",
    "tools", "tool_calls", "tool_choice", "function", "arguments", "parameters",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 5, 63, 4095, 4096, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 1e300, -0.0, 0.5,
    1e-300,
)  # fmt: skip
READ_SECONDS = 20


def any_value(r: random.Random, depth: int = 0) -> object:
    """A JSON value, no deeper than four."""
    kind = r.randrange(8 if depth < 4 else 5)
    if kind == 0:
        return r.choice(_NUMBERS)
    if kind == 1:
        return r.choice((True, False, None))
    if kind <= 4:
        return any_text(r)
    if kind == 5:
        return [any_value(r, depth + 1) for _ in range(r.randrange(5))]
    return {r.choice(_WORDS): any_value(r, depth + 1) for _ in range(r.randrange(6))}


def any_text(r: random.Random) -> str:
    """Characters of all planes, half surrogate pairs and controls among them."""
    ranges = ((0, 0x20), (0x20, 0x7F), (0x80, 0x800), (0xD800, 0xE000), (0x1F300, 0x1F700))
    count = r.choice((0, 1, 3, 20, 200))
    return "".join(chr(r.randrange(*r.choice(ranges))) for _ in range(count))


def any_messages(r: random.Random) -> list[dict[str, object]]:
    """With calls of tools, and what these gave."""
    made: list[dict[str, object]] = [
        {"role": r.choice(("user", "user", "system", "x")), "content": any_text(r)}
    ]
    while r.random() < 0.5:
        arguments = json.dumps(any_value(r)) if r.random() < 0.8 else any_text(r)
        calls = [
            {"function": {"name": r.choice(("f", "stop", "a b", "")), "arguments": arguments}}
            for _ in range(r.randrange(3))
        ]
        made += [
            {"role": "assistant", "content": r.choice((None, any_text(r))), "tool_calls": calls},
            {"role": "tool", "content": any_text(r)},
        ]
    return made


def any_tool(r: random.Random) -> dict[str, object]:
    """One that may be offered, or nearly."""
    function = {"name": r.choice(("f", "stop", "f", "x" * 65)), "parameters": any_value(r)}
    return {"type": r.choice(("function", "function", "x")), "function": function}


def sound_body(r: random.Random) -> dict[str, object]:
    """A body that a server could answer, some of its fields perhaps not as they should be."""
    body: dict[str, object] = {
        "prompt": r.choice(("def f(x):", "x", [1, 2, 3], ["y"], [[4, 5]])),
        "messages": any_messages(r),
        "tools": r.choice((None, [any_tool(r) for _ in range(r.randrange(4))])),
        "tool_choice": r.choice((None, None, "auto", "none", "required", any_tool(r))),
        "input": r.choice(("x", ["x", "y"], [1, 2], [[1], [2]])),
        "content": any_text(r),
        "tokens": [r.randrange(4096) for _ in range(r.randrange(400))],
        "max_tokens": r.choice((1, 3, 20)),
        "stream": r.random() < 0.5,
        "logprobs": r.choice((None, 0, 2, 5)),
        "stop": r.choice((None, "\n", ["a", "e", "return"])),
        "temperature": r.choice((0, 1, 2)),
        "logit_bias": r.choice((None, None, {"5": 3, "17": -100}, {"4095": 0.5}, {"x": 1})),
        "response_format": r.choice((None, None, {"type": "text"}, {"type": "json_schema"})),
        "frequency_penalty": r.choice((None, 0.5, -2, 3)),
    }
    for _ in range(r.choice((0, 0, 1, 2))):
        body[r.choice(tuple(body) + _WORDS)] = any_value(r)
    return body


def any_body(r: random.Random) -> bytes:
    """JSON, or nearly."""
    text = json.dumps(sound_body(r), ensure_ascii=r.random() < 0.5)
    content = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(r.choice((0, 0, 0, 1, 4))):
        if content:
            place = r.randrange(len(content))
            change = r.randrange(3)
            if change == 0:
                content[place] = r.randrange(256)
            elif change == 1:
                del content[place:]
            else:
                content[place:place] = bytes(r.randrange(256) for _ in range(r.randrange(9)))
    kind = r.randrange(24)
    if kind == 0:
        return b"[" * r.choice((31, 32, 33, 5000)) + b"]" * r.choice((0, 31, 32, 33, 5000))
    if kind == 1:
        return b'{"a":' * 3000
    if kind == 2:
        return b'{"prompt":"' + b"x" * r.choice((10_000, 100_000, 1 << 20, 3 << 20)) + b'"}'
    if kind == 3:
        return b'{"prompt":[' + b"1," * r.choice((300, 400, 100_000)) + b"1]}"
    return bytes(content)


def any_head(r: random.Random, length: int) -> bytes:
    """The head of a request with a body of ``length`` bytes, or of what is none."""
    method = r.choice(("POST",) * 12 + ("GET", "GET", "HEAD", "PUT", "\x00", "G E T", "P" * 300))
    path = r.choice(PATHS) if r.random() < 0.95 else "/" + "a" * r.choice((1000, 20_000))
    version = r.choice(("HTTP/1.1",) * 20 + ("HTTP/1.0", "HTTP/2.0", "HTTP/1.1x", ""))
    lines = [
        f"{method} {path} {version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    odd = (
        "Content-Length: -1", "Content-Length: 5, 5", "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked", "Expect: 100-continue", "Expect: x", "Connection: close",
        " folded", "no colon", ": empty", "A" * 17_000 + ": b", "Host: other", "X: \x01",
        "Authorization: Bearer x", "Connection: keep-alive, close",
    )  # fmt: skip
    for _ in range(r.choice((0, 0, 0, 1, 2))):
        lines.insert(r.randrange(1, len(lines) + 1), r.choice(odd))
    if r.random() < 0.05:
        lines += [f"X-{i}: {i}" for i in range(120)]
    if r.random() < 0.05:
        del lines[r.randrange(len(lines))]
    end = "\n" if r.random() < 0.03 else "\r\n"
    return (end.join(lines) + end * 2).encode("latin-1")


def any_request(r: random.Random) -> bytes:
    """The bytes of a request, or of several that are sent at once."""
    if r.random() < 0.03:
        return r.randbytes(r.choice((1, 10, 3000)))
    parts = []
    for _ in range(r.choice((1, 1, 1, 1, 2, 5))):
        body = any_body(r) if r.random() < 0.9 else b""
        length = len(body) + r.choice((0,) * 20 + (-1, 1, 1000))
        parts.append(any_head(r, max(length, 0)) + body)
    return b"".join(parts)


def send(r: random.Random, connect: Callable[[], socket.socket], request: bytes) -> bytes:
    """Send it whole, cut, or slowly; what came back until the other side closed, or was left."""
    manner = r.randrange(6)
    got = b""
    with connect() as raw:
        raw.settimeout(READ_SECONDS)
        try:
            if manner == 0:  # goes away in the middle
                raw.sendall(request[: r.randrange(len(request) + 1)])
                return got
            if manner == 1:  # in small pieces
                cuts = sorted(r.randrange(len(request) + 1) for _ in range(4))
                for begin, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
                    raw.sendall(request[begin:end])
                    time.sleep(r.random() / 500)
            else:
                raw.sendall(request)
            if manner == 2:  # does not wait for an answer
                return got
            if manner == 3:  # reads some of it
                return raw.recv(20)
            raw.settimeout(0.3)
            while piece := raw.recv(65536):
                got += piece
        except (TimeoutError, ConnectionError, BrokenPipeError):
            pass
    return got
