"""What a package says of where it comes from: an SBOM (CycloneDX ML-BOM) and licences."""

from __future__ import annotations

import json
import uuid
from importlib import resources
from pathlib import Path
from typing import Any

from slmtvm.bundle import Bundle
from slmtvm.errors import SlmError
from slmtvm.packaging.file import File

_NAMESPACE = uuid.UUID("7f0f6c1e-8f5b-5b0e-9d43-6c2f6a1d5e10")  # of serial numbers, drawn once
# What of these is part of a library or of a static program.
_LINKED = (
    ("slmtvm", "Apache-2.0", "the C runtime and the kernels"),
    ("musl", "MIT", "the C library of the static programs"),
    ("compiler-rt", "Apache-2.0 WITH LLVM-exception", "helpers of the C compiler"),
)


def write_papers(
    bundle: Bundle,
    target: str,
    name: str,
    version: str,
    license: str | None,
    files: tuple[File, ...],
    folder: Path,
) -> tuple[File, ...]:
    """sbom.cdx.json and licenses.txt in ``folder``, to lie under share/."""
    sbom, licenses = folder / "sbom.cdx.json", folder / "licenses.txt"
    sbom.write_text(_sbom(bundle, target, name, version, license, files), encoding="utf-8")
    licenses.write_text(_licenses(name, license), encoding="utf-8")
    return (File(f"share/{licenses.name}", licenses), File(f"share/{sbom.name}", sbom))


def _licenses(name: str, license: str | None) -> str:
    lines = [f"{name}: {license or 'not stated; ask who made the package'} (the weights)"]
    lines += [f"{part}: {terms} ({what})" for part, terms, what in _LINKED]
    return "\n".join(lines) + "\n\n" + _apache()


def _apache() -> str:
    """The text of slmtvm's own licence, which must go with what is made of it."""
    return (resources.files("slmtvm.packaging") / "LICENSE.txt").read_text(encoding="utf-8")


def _sbom(
    bundle: Bundle,
    target: str,
    name: str,
    version: str,
    license: str | None,
    files: tuple[File, ...],
) -> str:
    try:
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.spdx import is_expression, is_supported_id
    except ModuleNotFoundError as error:
        raise SlmError(
            f"{error.name} is not installed, which writes the package's SBOM; "
            "pip install 'slmtvm[package]'"
        ) from error

    def terms(expression: str | None) -> list[Any]:
        if expression is None:
            return []
        if is_supported_id(expression):
            return [DisjunctiveLicense(id=expression)]
        if is_expression(expression):
            return [LicenseExpression(expression)]
        return [DisjunctiveLicense(name=expression)]

    def sha256(value: str) -> list[HashType]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=value)]

    manifest = bundle.manifest
    facts = {
        "kind": manifest.model.get("kind"),
        "family": manifest.model.get("family"),
        "context": manifest.model.get("context"),
        "target": target,
        "counter": manifest.release.counter,
        **{f"check.{k}": v for k, v in manifest.extra.get("check", {}).items()},
    }
    model = Component(
        name=name, version=version, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="model",
        licenses=terms(license), hashes=sha256(manifest.weights.sha256),
        properties=[Property(name=f"slmtvm:{k}", value=f"{v}") for k, v in facts.items()],
    )  # fmt: skip
    parts = [
        Component(name=part, type=ComponentType.LIBRARY, bom_ref=part, licenses=terms(spdx),
                  version=manifest.made_by.get(part), description=what)
        for part, spdx, what in _LINKED
    ]  # fmt: skip
    parts += [
        Component(name=file.path, type=ComponentType.FILE, bom_ref=file.path,
                  hashes=sha256(file.sha256()))
        for file in files
    ]  # fmt: skip
    if manifest.source is not None:
        parts.append(
            Component(
                name=manifest.source["file"], type=ComponentType.DATA, bom_ref="source",
                description="the ONNX file that was compiled",
                hashes=sha256(manifest.source["sha256"]),
            )
        )  # fmt: skip
    bom = Bom(
        components=parts,
        metadata=BomMetaData(component=model, timestamp=None),
    )
    bom.register_dependency(model, parts)
    text = JsonV1Dot6(bom).output_as_string()
    table = json.loads(text)
    # What differs from run to run: a random number and the time.
    table.pop("serialNumber", None)
    table["metadata"].pop("timestamp", None)
    table = {**table, "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, json.dumps(table))}"}
    return json.dumps(table, indent=2, sort_keys=True) + "\n"
