"""greengrass: a component of AWS IoT Greengrass V2, a recipe and what it installs.

The folder is laid out as ``greengrass-cli deployment create --recipeDir recipes --artifactDir
artifacts`` reads it; `gdk component publish` puts a bucket's name into the URI.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.packaging.contents import Contents
from slmtvm.packaging.options import Options
from slmtvm.packaging.tarball import write_tarball

# Those that recipes name.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "aarch64"}
_NUMBERS = 3  # of a version
_INSTALL_SECONDS = 600
_DEFAULTS = {"Keys": "/etc/slm/keys.pem", "Options": "--port 8080"}


def write_greengrass(several: Sequence[Contents], output: Path, options: Options) -> None:
    """The folder: recipes/slm.NAME-VERSION.json, and artifacts/slm.NAME/VERSION/ with a package of
    each of ``several`` targets.

    Raises SlmError where nothing signs them, an architecture is not Greengrass's, two targets have
    the same one, or the version has no three numbers.
    """
    first = several[0]
    if options.signer is None:
        raise SlmError("must be given: slm-install takes what is signed", where="--key")
    numbers = first.version.split(".")
    if len(numbers) > _NUMBERS:
        raise SlmError(
            f"{first.version!r} has more than three numbers, a component's version has three; "
            "sign the bundle with another --version",
            where=f"{first.bundle.path}",
        )
    version = ".".join([*numbers, *["0"] * (_NUMBERS - len(numbers))])
    component = f"slm.{first.name}"
    artifacts = output / "artifacts" / component / version
    artifacts.mkdir(parents=True)
    manifests = [_manifest(contents, artifacts, options) for contents in several]
    arches = [manifest["Platform"]["architecture"] for manifest in manifests]
    if len(set(arches)) != len(arches):
        raise SlmError("a component has one target an architecture", where="--target")
    recipe = {
        "RecipeFormatVersion": "2020-01-25",
        "ComponentName": component,
        "ComponentVersion": version,
        "ComponentType": "aws.greengrass.generic",
        "ComponentDescription": f"Compiled language model {first.name}, served over HTTP.",
        "ComponentPublisher": "slmtvm",
        "ComponentConfiguration": {"DefaultConfiguration": _DEFAULTS},
        "Manifests": manifests,
    }
    (output / "recipes").mkdir()
    text = json.dumps(recipe, indent=2) + "\n"
    (output / "recipes" / f"{component}-{version}.json").write_text(text, encoding="utf-8")


def _manifest(contents: Contents, artifacts: Path, options: Options) -> dict[str, Any]:
    """What devices of one architecture install and run.

    The nucleus compares the package with the digest of the deployment before it runs anything, and
    slm-install with its own signature. Versions lie in the component's work folder, which stays.
    """
    arch = contents.entry.arch
    if arch not in _ARCHITECTURES:
        raise SlmError(
            f"{contents.target} is {arch}, and Greengrass has {', '.join(_ARCHITECTURES)}",
            where="--target",
        )
    package = f"slm-{contents.name}-{contents.target}.tar.gz"
    write_tarball([contents], artifacts / package, options)
    inside = f"{contents.name}-{contents.version}-{contents.target}/bin"
    tools = " ".join(f"{inside}/{name}" for name in ("slm-install", "slm-verify"))
    current = f'"{{work:path}}"/models/{contents.name}/current'
    install = (
        'set -e; mkdir -p "{work:path}/bin"; '
        f'tar -xzf "{{artifacts:path}}/{package}" -C "{{work:path}}/bin" '
        f"--strip-components=2 {tools}; "
        '"{work:path}/bin/slm-install" --root "{work:path}/models" --keys "{configuration:/Keys}" '
        f'install "{{artifacts:path}}/{package}"'
    )
    return {
        "Name": contents.target,
        "Platform": {"os": "linux", "architecture": _ARCHITECTURES[arch]},
        "Lifecycle": {
            "install": {"Script": install, "Timeout": _INSTALL_SECONDS},
            "run": {
                "Script": f"exec {current}/bin/slm-serve {current}/bundle "
                "{configuration:/Options}"
            },
        },
        "Artifacts": [
            {
                "URI": f"s3://BUCKET_NAME/COMPONENT_NAME/COMPONENT_VERSION/{package}",
                "Unarchive": "NONE",
                "Permission": {"Read": "OWNER", "Execute": "NONE"},
            }
        ],
    }
