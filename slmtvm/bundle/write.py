"""Writing a bundle: built in a folder beside its place, moved there in one step."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from slmtvm.bundle.build_folder import build_folder
from slmtvm.bundle.manifest import (
    CUDA,
    FileEntry,
    Manifest,
    TargetEntry,
    check_target_name,
    library_path,
    object_path,
)
from slmtvm.bundle.move import move_into_place
from slmtvm.bundle.read import MANIFEST, Bundle
from slmtvm.codegen.library import Progress, build_library
from slmtvm.codegen.memory import predict_memory
from slmtvm.codegen.tables import kv_window, output_facts
from slmtvm.codegen.weights import WeightsFile, merge_weights
from slmtvm.errors import BundleError, InvalidModelError
from slmtvm.plan.model import Plan
from slmtvm.runtime.interface import ABI_VERSION
from slmtvm.target import Target

_MADE_BY = ("slmtvm", "apache-tvm", "ziglang")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Checked:
    """What a check of a bundle gave: JSON values for ``extra["check"]``, and by target those that
    a device compares its own results with."""

    record: Mapping[str, Any]
    selftests: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TextFiles:
    """What a bundle needs to read and write text: the content of a tokenizer.json, ``tables`` that
    ``slmtvm.text.compile_tokenizer`` made of it, and the JSON that ``slmtvm.text.chat_pieces`` made
    of a chat template; None for what there is not."""

    tokenizer: bytes | None = None
    tables: bytes | None = None
    chat: bytes | None = None


NO_TEXT = TextFiles()


def write_bundle(
    path: str | Path,
    plans: Sequence[tuple[Target, Plan]],
    *,
    model: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    text: TextFiles = NO_TEXT,
    check: Callable[[Path], Checked] | None = None,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile and link ``plans``, one for each target, into the bundle ``path``.

    ``model`` holds JSON values for the manifest's part of that name, besides what the plan says;
    ``source`` is the ONNX file (its name and SHA-256 are noted), ``text`` what is included for
    text. ``check`` gets the folder of the bundle when it is whole but not yet in its place; what it
    returns goes into the manifest, as does ``extra``, JSON values. Weights that several plans lay
    out alike are stored once. The bundle appears whole or not at all; an older one at ``path`` is
    replaced, anything else there is left alone. Equal input gives equal bytes. Raises BundleError
    where ``path`` cannot be written, InvalidModelError where ``source`` cannot be read, and what
    ``check`` raises.
    """
    path = Path(path)
    ordered = sorted(plans, key=lambda pair: pair[0].name)
    _check_arguments(path, [target.name for target, _ in ordered])
    weights, rebased = merge_weights([plan for _, plan in ordered])
    try:
        with build_folder(path) as folder:
            bundle = _build(
                folder, ordered, rebased, weights, model, source, text, check, extra or {},
                progress,
            )  # fmt: skip
            move_into_place(folder, path)
    except OSError as error:
        advice = "; free some room, or choose another folder" if error.errno in _FULL else ""
        message = f"cannot be written: {error.strerror}{advice}"
        raise BundleError(message, where=f"{path}") from error
    return Bundle(path, bundle.manifest)


def _build(
    folder: Path,
    ordered: Sequence[tuple[Target, Plan]],
    rebased: Sequence[Plan],
    weights: WeightsFile,
    model: Mapping[str, Any] | None,
    source: str | Path | None,
    text: TextFiles,
    check: Callable[[Path], Checked] | None,
    extra: Mapping[str, Any],
    progress: Progress | None,
) -> Bundle:
    """The whole bundle in ``folder``, checked; ``rebased`` are the plans that read ``weights``."""
    targets = {}
    (folder / "lib").mkdir()
    for (target, _), plan in zip(ordered, rebased, strict=True):
        library = folder / library_path(target.name)
        build_library(
            plan, target, library, weights, folder / object_path(target.name), progress=progress
        )
        targets[target.name] = _target_entry(target, plan, weights, library)
    manifest = Manifest(
        weights=FileEntry("weights.bin", weights.size, weights.write(folder / "weights.bin")),
        targets=targets,
        model={**_model_facts(ordered[0][1]), **(model or {})},
        source=_source(source),
        tokenizer=_write_file(text.tokenizer, folder, "tokenizer.json"),
        tokenizer_tables=_write_file(text.tables, folder, "tokenizer.bin"),
        chat=_write_file(text.chat, folder, "chat.json"),
        made_by={name: _version(name) for name in _MADE_BY},
        extra=dict(extra),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    if check is not None:
        manifest = _with_record(manifest, check(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    _set_modes(folder)
    return Bundle.open(folder)


def _with_record(manifest: Manifest, checked: Checked) -> Manifest:
    return replace(
        manifest,
        targets={
            name: replace(target, selftest=checked.selftests.get(name))
            for name, target in manifest.targets.items()
        },
        extra={**manifest.extra, "check": dict(checked.record)},
    )


def _check_arguments(path: Path, names: list[str]) -> None:
    if not names:
        raise BundleError("no target to compile for", where=f"{path}")
    for name in names:
        check_target_name(name, f"{path}")
    if len(set(names)) != len(names):
        raise BundleError(f"a target is named twice: {', '.join(names)}", where=f"{path}")
    if path.is_symlink() or (path.exists() and not (path / MANIFEST).is_file()):
        raise BundleError(
            "exists and is not a bundle: it is left alone; choose another path", where=f"{path}"
        )


def _target_entry(target: Target, plan: Plan, weights: WeightsFile, library: Path) -> TargetEntry:
    return TargetEntry(
        library=_entry(library, library_path(target.name)),
        object=_entry(library.with_suffix(".o"), object_path(target.name)),
        triple=target.link,
        abi=ABI_VERSION,
        arch=target.arch,
        requires=(*target.requires, CUDA) if target.cuda else target.requires,
        memory=asdict(predict_memory(plan, weights.size)),
    )


def _entry(file: Path, name: str) -> FileEntry:
    content = file.read_bytes()
    return FileEntry(name, len(content), hashlib.sha256(content).hexdigest())


def _model_facts(plan: Plan) -> dict[str, Any]:
    return {
        **plan.info,
        "kind": plan.kind,
        "context": plan.context,
        "vocab_size": plan.vocab_size,
        "output_size": plan.output_size,
        "outputs": output_facts(plan),
        "mask": plan.mask,
        "kv_window": kv_window(plan),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _source(source: str | Path | None) -> dict[str, str] | None:
    if source is None:
        return None
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=f"{source}") from error
    return {"file": Path(source).name, "sha256": digest.hexdigest()}


def _write_file(content: bytes | None, folder: Path, name: str) -> FileEntry | None:
    if content is None:
        return None
    file = folder / name
    file.write_bytes(content)
    return _entry(file, name)


def _set_modes(folder: Path) -> None:
    """The same modes whatever made the files: a bundle is read by others than its writer."""
    for item in (folder, *folder.rglob("*")):
        item.chmod(0o755 if item.is_dir() or item.suffix == ".so" else 0o644)
