"""The runtime's reader of JSON takes what Python's takes, and finds the same values."""

from __future__ import annotations

import ctypes
import json
import random
from pathlib import Path
from typing import Any

import pytest

from slmtvm.codegen.zig import zig_cc
from slmtvm.target import Target

RUNTIME = Path(__file__).parents[2] / "slmtvm" / "codegen" / "runtime"


_ODD = b'{}[]",:\\0129.eE+-tn u\n\x00\xff'


class Text(ctypes.Structure):
    """slm_json."""

    _fields_ = (("next", ctypes.c_void_p), ("end", ctypes.c_void_p))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("json") / "json.so"
    source = str(RUNTIME / "json.c")
    zig_cc(Target.load("host").link, ["-O2", "-shared", "-fPIC", source, "-o", str(path)])
    library = ctypes.CDLL(str(path))
    library.slm_json_valid.argtypes = (Text,)
    library.slm_json_member.argtypes = (Text, ctypes.c_char_p, ctypes.c_void_p)
    library.slm_json_number.argtypes = (Text, ctypes.c_void_p)
    library.slm_json_string.argtypes = (Text, ctypes.c_char_p, ctypes.c_size_t)
    library.slm_json_each.argtypes = (ctypes.c_void_p,) * 3
    return library


def text_of(content: bytes) -> tuple[Text, Any]:
    buffer = ctypes.create_string_buffer(content, len(content) or 1)
    at = ctypes.addressof(buffer)
    return Text(at, at + len(content)), buffer


def content_of(text: Text) -> bytes:
    return ctypes.string_at(text.next, text.end - text.next)


def random_value(rng: random.Random, deep: int) -> Any:
    kinds = ["number", "float", "text", "word"] + ["list", "object"] * (deep > 0)
    match rng.choice(kinds):
        case "number":
            return rng.randrange(-(10**6), 2**62)
        case "float":
            return rng.choice([0.5, -1e-9, 1e300])
        case "text":
            return rng.choice(["", "a", '"\\', "\u00e4", "\n", "weights"])
        case "word":
            return rng.choice([True, False, None])
        case "list":
            return [random_value(rng, deep - 1) for _ in range(rng.randrange(4))]
        case _:
            return {f"k{n}": random_value(rng, deep - 1) for n in range(rng.randrange(4))}


def python_takes(content: bytes) -> bool:
    def refuse(_: str) -> None:
        raise ValueError("no JSON, though Python takes it")

    try:
        json.loads(content.decode("latin-1"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def test_what_is_json_is_what_python_says(runtime: ctypes.CDLL) -> None:
    rng = random.Random(0)
    taken = 0
    for turn in range(6000):
        content = json.dumps(random_value(rng, 4), indent=rng.choice([None, 1])).encode()
        if turn % 3:
            changed = bytearray(content)
            for _ in range(rng.randint(1, 2)):
                changed[rng.randrange(len(changed))] = rng.choice(
                    b'{}[]",:\\0129.eE+-tn u\n\x00\xff'
                )
            content = bytes(changed)
        text, _buffer = text_of(content)
        takes = runtime.slm_json_valid(text) == 1
        assert takes == python_takes(content), content
        taken += takes
    assert 2000 < taken < 5000


def test_depth_is_bounded(runtime: ctypes.CDLL) -> None:
    for depth, wanted in ((60, 1), (66, 0), (1_000_000, 0)):
        text, _buffer = text_of(b"[" * depth + b"]" * depth)
        assert runtime.slm_json_valid(text) == wanted


def test_every_member_and_element_is_found(runtime: ctypes.CDLL) -> None:
    rng = random.Random(1)

    def compare(text: Text, value: Any) -> None:
        if isinstance(value, (dict, list)):
            at, name, inner = Text(text.next, text.end), Text(), Text()
            items = list(value.items()) if isinstance(value, dict) else [(None, v) for v in value]
            found = 0
            while runtime.slm_json_each(ctypes.byref(at), ctypes.byref(name), ctypes.byref(inner)):
                key, wanted = items[found]
                assert (content_of(name).decode() if name.next else None) == key
                compare(Text(inner.next, inner.end), wanted)
                found += 1
            assert found == len(items)
            if isinstance(value, dict):
                for key in value:
                    assert runtime.slm_json_member(text, key.encode(), ctypes.byref(inner)) == 1
                    assert json.loads(content_of(inner)) == value[key]
                assert runtime.slm_json_member(text, b"none", ctypes.byref(inner)) == 0
        number, copy = ctypes.c_uint64(), ctypes.create_string_buffer(16)
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        assert runtime.slm_json_number(text, ctypes.byref(number)) == is_number
        if is_number:
            assert number.value == value
        plain = isinstance(value, str) and json.dumps(value) == f'"{value}"' and value != ""
        if plain:
            assert runtime.slm_json_string(text, copy, 16) == 1 and copy.value.decode() == value
            assert runtime.slm_json_string(text, copy, len(value)) == 0

    for _ in range(400):
        value = random_value(rng, 4)
        text, _buffer = text_of(json.dumps(value, indent=rng.choice([None, 2])).encode())
        compare(text, value)


@pytest.mark.parametrize("content", [b"9223372036854775808", b"-1", b"1.0", b"", b"1e3", b'"1"'])
def test_a_number_that_is_not_whole_or_too_large_is_none(
    content: bytes, runtime: ctypes.CDLL
) -> None:
    text, _buffer = text_of(content)
    assert runtime.slm_json_number(text, ctypes.byref(ctypes.c_uint64())) == 0
