"""A bundle that is not as its manifest says is refused, with the file and the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmtvm.bundle import Bundle
from slmtvm.bundle.manifest import parse_manifest
from slmtvm.bundle.write import TextFiles, write_bundle
from slmtvm.errors import BundleError
from slmtvm.target import Target
from tests.runtime.toy import toy_decoder

LIBRARY = "lib/cortex-a72.so"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    path = folder / "x.slm"
    plans = [(Target.load("cortex-a72"), toy_decoder())]
    write_bundle(path, plans, text=TextFiles(b"{}"), model={"note": {"nested": [1]}})
    return path


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "x.slm")


def test_a_manifest_read_and_written_is_the_same(original: Path) -> None:
    text = (original / "manifest.json").read_text()
    assert parse_manifest(text, "x").to_json() == text


def test_a_missing_bundle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.slm").write_text("")
    (tmp_path / "empty.slm").mkdir()
    for name in ("none.slm", "file.slm", "empty.slm"):
        with pytest.raises(BundleError, match=name):
            Bundle.open(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.bin", LIBRARY, "tokenizer.json"])
def test_a_missing_or_shortened_file_is_found_when_opening(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name}: {len(content) - 1} bytes, the manifest says"):
        Bundle.open(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["weights.bin", LIBRARY, "tokenizer.json"])
def test_a_changed_byte_is_found_by_verify(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[-1] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}: damaged or changed: SHA-256"):
        Bundle.open(bundle).verify()


def test_a_changed_library_or_tokenizer_is_never_handed_out(bundle: Path) -> None:
    for name in (LIBRARY, "tokenizer.json"):
        content = bytearray((bundle / name).read_bytes())
        content[0] ^= 1
        (bundle / name).write_bytes(content)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match="damaged or changed"):
        opened.library("cortex-a72")
    with pytest.raises(BundleError, match="damaged or changed"):
        opened.tokenizer()


def put(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


ENTRY = ("targets", "cortex-a72")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value=1), "format 1, this slmtvm reads format 7; compile the model again"),
        (put("format", value=8), "bundle format 8"),
        (put("format", value="1"), "field format must be a whole number"),
        (put("format", value=True), "field format must be a whole number"),
        (put("weights", value=None), r"manifest\.weights must be an object"),
        (put("weights", "bytes", value=-1), r"manifest\.weights field bytes"),
        (put("weights", "bytes", value=2**70), r"manifest\.weights field bytes"),
        (put("weights", "file", value="../weights.bin"), "must be 'weights.bin'"),
        (put("weights", "sha256", value="xyz"), "64 hex digits"),
        (put("targets", value={}), "no targets"),
        (put("targets", value=[]), r"manifest\.targets must be an object"),
        (put("targets", "../x", value={}), "target name '../x'"),
        (put(*ENTRY, "library", "file", value="/lib/libc.so.6"), "must be 'lib/cortex-a72.so'"),
        (put(*ENTRY, "requires", value="asimd"), "list of strings"),
        (put(*ENTRY, "requires", value=[1]), "list of strings"),
        (put(*ENTRY, "arch", value=None), "field arch must be a string"),
        (put(*ENTRY, "memory", value={}), "field state must be a whole number"),
        (put("model", value=3), r"manifest\.model must be an object"),
        (put("source", value="x.onnx"), r"manifest\.source must be an object"),
        (put("tokenizer", value=[1]), r"manifest\.tokenizer must be an object"),
    ],
)
def test_a_wrong_field_is_named(
    bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 10_000, "JSON"),
        (b"[]", "must be an object"),
        (b"\xff\xfe", "not UTF-8"),
        (b" " * (17 << 20), "too large"),
    ],
    ids=["empty", "cut off", "deep", "long number", "list", "bytes", "huge"],
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, content: bytes, message: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_a_bundle_without_tokenizer_or_source_opens(bundle: Path) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tokenizer"] = manifest["source"] = None
    file.write_text(json.dumps(manifest))
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        opened.tokenizer()
