"""manifest.json: what a bundle holds and how to tell that it is whole.

It names the SHA-256 of every other file: whoever trusts its bytes trusts the bundle, so a signature
(manifest.json.sig) has to cover this one file only. ``manifest.schema.json`` describes its fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from slmtvm.errors import BundleError

FORMAT = 7  # changes with what a library says of itself, or what its functions are
_TARGET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMORY = ("state", "arena", "scratch_per_thread", "io", "weights")


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its path inside, its size in bytes, its SHA-256 in hex."""

    file: str
    bytes: int
    sha256: str


CUDA = "cuda"
"""What a library requires that runs its kernels on a GPU: a CUDA driver."""


@dataclass(frozen=True)
class TargetEntry:
    """One target's library, and what the machine must have to run it: features of the CPU (names as
    in /proc/cpuinfo), or ``CUDA``.

    ``object`` holds the library's kernels and tables without the runtime, to be linked into
    programs; ``triple`` is what the library is linked for, ``abi`` its SLM_ABI_VERSION. ``memory``
    predicts bytes: ``state`` (KV cache), ``arena``, ``io`` once for each session,
    ``scratch_per_thread``, and ``weights``, mapped once for all. ``selftest`` is what
    ``slmtvm.verify.selftest`` recorded.
    """

    library: FileEntry
    object: FileEntry
    triple: str
    abi: int
    arch: str
    requires: tuple[str, ...]
    memory: dict[str, int]
    selftest: dict[str, Any] | None = None


@dataclass(frozen=True)
class Release:
    """Which of a model's bundles this is; ``counter`` never falls from one to the next."""

    counter: int = 0
    version: str = ""


@dataclass(frozen=True)
class Manifest:
    """The bundle's contents; ``model`` holds JSON values about the model (kind, context, ...)."""

    weights: FileEntry
    targets: dict[str, TargetEntry]
    model: dict[str, Any]
    source: dict[str, str] | None = None  # {"file": name, "sha256": hex} of the ONNX file
    tokenizer: FileEntry | None = None
    tokenizer_tables: FileEntry | None = None  # the tokenizer compiled, for devices without Python
    chat: FileEntry | None = None  # the chat template taken apart, for devices without jinja2
    release: Release = field(default_factory=Release)
    made_by: dict[str, str] = field(default_factory=dict)  # package -> version
    extra: dict[str, Any] = field(default_factory=dict)  # what a later compiler may add

    def to_json(self) -> str:
        """The file's text; equal manifests give equal text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=2) + "\n"


def library_path(target: str) -> str:
    """Where the library of ``target`` lies in a bundle."""
    return f"lib/{target}.so"


def object_path(target: str) -> str:
    """Where the object of ``target`` lies in a bundle."""
    return f"lib/{target}.o"


def check_target_name(name: str, where: str) -> None:
    """Raise BundleError where ``name`` cannot be a file's name in every bundle."""
    if not _TARGET_NAME.fullmatch(name):
        raise BundleError(f"target name {name!r} must be letters, digits and . _ + -", where=where)


def check_version(version: str, where: str) -> None:
    """Raise BundleError where ``version`` is no version that every package format takes."""
    if version and not _VERSION.fullmatch(version):
        raise BundleError(
            f"version {version!r} must be numbers with dots between, such as 1.2.0", where=where
        )


def parse_manifest(text: str, where: str) -> Manifest:
    """Read a manifest; raises BundleError, naming the field, where anything is not as written."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not valid JSON: {error}", where=where) from error
    fields = _Fields(table, "manifest", where)
    version = fields.integer("format")
    if version != FORMAT:
        raise BundleError(
            f"bundle format {version}, this slmtvm reads format {FORMAT}; compile the model again",
            where=where,
        )
    targets = fields.table("targets")
    for name in targets.values:
        check_target_name(name, where)
    manifest = Manifest(
        weights=_file(fields.table("weights"), "weights.bin"),
        targets={name: _target(targets.table(name), name) for name in sorted(targets.values)},
        model=fields.table("model").values,
        source=None if fields.missing("source") else _source(fields.table("source")),
        tokenizer=_optional_file(fields, "tokenizer", "tokenizer.json"),
        tokenizer_tables=_optional_file(fields, "tokenizer_tables", "tokenizer.bin"),
        chat=_optional_file(fields, "chat", "chat.json"),
        release=_release(fields.table("release")),
        made_by={} if fields.missing("made_by") else _texts(fields.table("made_by")),
        extra={} if fields.missing("extra") else fields.table("extra").values,
    )
    if not manifest.targets:
        raise BundleError("no targets", where=where)
    return manifest


class _Fields:
    """A JSON object whose fields are asked for by name and type."""

    def __init__(self, values: object, path: str, where: str) -> None:
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise self.wrong("must be an object")
        self.values: dict[str, Any] = values

    def wrong(self, message: str) -> BundleError:
        return BundleError(f"{self.path} {message}", where=self.where)

    def missing(self, name: str) -> bool:
        return self.values.get(name) is None

    def table(self, name: str) -> _Fields:
        return _Fields(self.values.get(name), f"{self.path}.{name}", self.where)

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise self.wrong(f"field {name} must be a whole number")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.wrong(f"field {name} must be a string")
        return value

    def sha256(self) -> str:
        value = self.text("sha256")
        if not _SHA256.fullmatch(value):
            raise self.wrong("field sha256 must be 64 hex digits")
        return value


def _file(fields: _Fields, expected: str) -> FileEntry:
    # The names are fixed: a manifest cannot point outside its bundle.
    if fields.text("file") != expected:
        raise fields.wrong(f"field file must be {expected!r}")
    return FileEntry(expected, fields.integer("bytes"), fields.sha256())


def _optional_file(fields: _Fields, name: str, expected: str) -> FileEntry | None:
    return None if fields.missing(name) else _file(fields.table(name), expected)


def _target(fields: _Fields, name: str) -> TargetEntry:
    requires = fields.values.get("requires")
    if not isinstance(requires, list) or not all(isinstance(r, str) for r in requires):
        raise fields.wrong("field requires must be a list of strings")
    memory = fields.table("memory")
    return TargetEntry(
        library=_file(fields.table("library"), library_path(name)),
        object=_file(fields.table("object"), object_path(name)),
        triple=fields.text("triple"),
        abi=fields.integer("abi"),
        arch=fields.text("arch"),
        requires=tuple(requires),
        memory={key: memory.integer(key) for key in _MEMORY},
        selftest=None if fields.missing("selftest") else fields.table("selftest").values,
    )


def _release(fields: _Fields) -> Release:
    release = Release(fields.integer("counter"), fields.text("version"))
    check_version(release.version, fields.where)
    return release


def _texts(fields: _Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.values}


def _source(fields: _Fields) -> dict[str, str]:
    return {"file": fields.text("file"), "sha256": fields.sha256()}
