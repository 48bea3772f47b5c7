"""A Greengrass component: its recipe has the documented form, and its scripts do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slmtvm.errors import SlmError
from slmtvm.packaging import Options
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.greengrass import write_greengrass
from tests.packaging.conftest import Keys
from tests.packaging.updaters import write

SECONDS = 60
_TEXT = {"type": "string", "minLength": 1}


def closed(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


_STEP = {
    "anyOf": [
        _TEXT,
        closed(
            ["Script"],
            {
                "Script": _TEXT,
                "Timeout": {"type": "integer", "minimum": 1},
                "RequiresPrivilege": {"type": "boolean"},
                "Skipif": {"type": "string", "pattern": "^(onpath|exists) "},
                "Setenv": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        ),
    ]
}
_STEPS = ("bootstrap", "install", "run", "startup", "shutdown", "recover")
# The recipe reference of AWS IoT Greengrass V2: format 2020-01-25, unknown properties are errors.
RECIPE = closed(
    ["RecipeFormatVersion", "ComponentName", "ComponentVersion", "Manifests"],
    {
        "RecipeFormatVersion": {"const": "2020-01-25"},
        "ComponentName": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
        "ComponentVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "ComponentType": {"enum": ["aws.greengrass.generic"]},
        "ComponentDescription": _TEXT,
        "ComponentPublisher": _TEXT,
        "ComponentConfiguration": closed(
            ["DefaultConfiguration"], {"DefaultConfiguration": {"type": "object"}}
        ),
        "ComponentDependencies": {"type": "object"},
        "Manifests": {
            "type": "array",
            "minItems": 1,
            "items": closed(
                ["Lifecycle"],
                {
                    "Name": _TEXT,
                    "Platform": {
                        "type": "object",
                        "properties": {
                            "os": {"enum": ["all", "*", "linux", "darwin", "windows"]},
                            "architecture": {"enum": ["*", "amd64", "arm", "aarch64", "x86"]},
                        },
                    },
                    "Lifecycle": closed(
                        [],
                        dict.fromkeys(_STEPS, _STEP),
                    ),
                    "Artifacts": {
                        "type": "array",
                        "items": closed(
                            ["URI"],
                            {
                                "URI": {"type": "string", "pattern": "^(s3|docker|lambda)"},
                                "Unarchive": {"enum": ["NONE", "ZIP"]},
                                "Permission": closed(
                                    [],
                                    {
                                        name: {"enum": ["NONE", "OWNER", "ALL"]}
                                        for name in ("Read", "Execute")
                                    },
                                ),
                            },
                        ),
                    },
                },
            ),
        },
    },
)  # fmt: skip


def variables(text: str, known: dict[str, str]) -> str:
    """``text`` with its recipe variables replaced, as the nucleus does; all must be known."""
    return re.sub(r"\{([a-z]+:[A-Za-z/]+)\}", lambda match: known[match[1]], text)


@pytest.mark.slow
def test_a_component_installs_and_serves_the_model(
    contents: Contents, options: Options, keys: Keys, other_keys: Keys, tmp_path: Path
) -> None:
    made = write("greengrass", contents, options, tmp_path / "component")
    (recipe_file,) = (made / "recipes").iterdir()
    recipe = json.loads(recipe_file.read_text())
    jsonschema.validate(recipe, RECIPE)
    name, version = recipe["ComponentName"], recipe["ComponentVersion"]
    assert (name, version) == ("slm.toy", "1.1.0")
    assert recipe_file.name == f"{name}-{version}.json"
    (manifest,) = recipe["Manifests"]
    artifacts = made / "artifacts" / name / version
    (artifact,) = manifest["Artifacts"]
    assert [artifact["URI"].split("/")[-1]] == [path.name for path in artifacts.iterdir()]

    work = tmp_path / "a work folder"
    work.mkdir()
    settings = recipe["ComponentConfiguration"]["DefaultConfiguration"]
    assert settings == {"Keys": "/etc/slm/keys.pem", "Options": "--port 8080"}
    socket = tmp_path / "socket"

    def script(step: str, keys: Keys) -> list[str]:
        known = {
            "work:path": str(work), "artifacts:path": str(artifacts),
            "configuration:/Keys": str(keys.public),
            "configuration:/Options": f"--port 0 --unix {socket}",
        }  # fmt: skip
        return ["sh", "-c", variables(manifest["Lifecycle"][step]["Script"], known)]

    refused = subprocess.run(script("install", other_keys), capture_output=True, text=True)
    assert refused.returncode == 1 and "not signed by a key" in refused.stderr
    subprocess.run(script("install", keys), check=True)
    server = subprocess.Popen(script("run", keys), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and "listening on" in server.stdout.readline()
        end = time.monotonic() + SECONDS
        while not socket.exists() and time.monotonic() < end:
            time.sleep(0.01)
        curl = ["curl", "-s", "--unix-socket", str(socket), "http://localhost/v1/models"]
        models = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
        assert json.loads(models)["object"] == "list"
    finally:
        server.terminate()  # the shell has become the server
        server.communicate(timeout=SECONDS)
    assert server.returncode == 0


def test_what_is_no_component_says_why(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    def refused(message: str, several: list[Contents], options: Options = options) -> None:
        with pytest.raises(SlmError, match=message):
            write_greengrass(several, tmp_path / "x" / "component", options)

    (tmp_path / "x").mkdir()
    foreign = replace(contents, entry=replace(contents.entry, arch="riscv64"))
    refused("is riscv64, and Greengrass has x86_64, aarch64", [foreign])
    refused("--key: must be given", [contents], Options())
    refused(r"'1\.2\.3\.4' has more than three numbers", [replace(contents, version="1.2.3.4")])


def test_a_component_has_a_manifest_for_each_architecture(
    contents: Contents, options: Options, tmp_path: Path
) -> None:
    """The second is this one by another name: what a recipe says follows from the architecture."""
    arch = {"x86_64": "aarch64", "aarch64": "x86_64"}[contents.entry.arch]
    other = replace(contents, target="other", entry=replace(contents.entry, arch=arch), version="7")
    write_greengrass([replace(contents, version="7"), other], tmp_path / "component", options)
    (file,) = (tmp_path / "component/recipes").iterdir()
    recipe = json.loads(file.read_text())
    jsonschema.validate(recipe, RECIPE)
    assert recipe["ComponentVersion"] == "7.0.0"
    platforms = [manifest["Platform"]["architecture"] for manifest in recipe["Manifests"]]
    assert sorted(platforms) == ["aarch64", "amd64"]
    (folder,) = (tmp_path / "component/artifacts/slm.toy").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        manifest["Artifacts"][0]["URI"].split("/")[-1] for manifest in recipe["Manifests"]
    }
    with pytest.raises(SlmError, match="one target an architecture"):
        write_greengrass([contents, contents], tmp_path / "twice", options)
