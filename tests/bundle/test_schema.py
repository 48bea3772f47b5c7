"""Every manifest that is written is as manifest.schema.json describes it."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from slmtvm.bundle.manifest import FORMAT
from tests.end_to_end.bundles import bundle_for
from tests.packaging.conftest import Keys, Release, keys, release  # noqa: F401
from tests.packaging.devices import HOST

SCHEMA = json.loads((resources.files("slmtvm.bundle") / "manifest.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def manifest(release: Release) -> dict[str, Any]:  # noqa: F811
    return json.loads((release.bundle(1) / "manifest.json").read_text())


def test_the_schema_is_one_and_of_this_format() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == FORMAT


@pytest.mark.slow
def test_a_toy_bundle_s_manifest_fits(manifest: dict[str, Any]) -> None:
    VALIDATOR.validate(manifest)
    assert manifest["release"] == {"counter": 1, "version": "1.1.0"}
    assert manifest["made_by"]["ziglang"]


@pytest.mark.slow
def test_a_compiled_model_s_manifest_fits(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle: Path = bundle_for(tmp_path_factory, "demo", (HOST,))
    written = json.loads((bundle / "manifest.json").read_text())
    VALIDATOR.validate(written)
    assert written["extra"]["check"]["kl"] < 0.01
    assert len(written["targets"][HOST]["selftest"]["tokens"]) == 37


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 3),
        (("weights", "sha256"), "x"),
        (("weights", "bytes"), -1),
        (("release", "version"), "one"),
        (("release", "counter"), "1"),
        (("targets",), {}),
        (("targets", HOST, "arch"), "z80"),
        (("targets", HOST, "selftest"), {"tokens": [], "sha256": "0" * 64}),
        (("unknown",), 1),
        (("targets", HOST, "unknown"), 1),
    ],
)
def test_another_manifest_does_not_fit(
    manifest: dict[str, Any], path: tuple[str, ...], value: object
) -> None:
    changed = table = copy.deepcopy(manifest)
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    with pytest.raises(ValidationError):
        VALIDATOR.validate(changed)
