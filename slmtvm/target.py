"""What a model is compiled for: one TOML file for each board or core, in ``targets/``."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from slmtvm import host
from slmtvm.errors import TargetError
from slmtvm.files import did_you_mean, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_FIELDS = {
    "name": str, "description": str, "isa": str, "arch": str, "llvm": dict, "link": str,
    "requires": list,
}  # fmt: skip
_OPTIONAL = {"read_gb_per_second": float, "cuda": dict}
_CUDA_FIELDS = {
    "arch": str, "multiprocessors": int, "fallback": str, "read_gb_per_second": float,
}  # fmt: skip
_CUDA_OPTIONAL = {"release": int, "persistent": bool, "ptx": bool}
CUDA_RELEASES = (11, 12, 13)
_TOML_NAMES = {
    bool: "true or false", int: "an integer", str: "a string", dict: "a table", list: "a list",
    float: "a number",
}  # fmt: skip
_MAX_TOML_BYTES = 1 << 20
ARCHITECTURES = ("x86_64", "aarch64", "riscv64")


@dataclass(frozen=True)
class CudaTarget:
    """The GPU of a target: ``arch`` as NVRTC names it, and how many multiprocessors it has.

    ``fallback`` is the target whose library runs where there is no such GPU. ``release`` is the
    major release of CUDA whose compiler makes what the device's driver loads.
    ``read_gb_per_second`` is the memory's, as data sheets have it: models of speed are made with
    it, nothing else.
    ``persistent``: a decoded token is one kernel that stays on the GPU from the first step to the
    last. ``ptx``: the library holds PTX as well, which drivers compile for later GPUs.
    """

    arch: str
    multiprocessors: int
    fallback: str
    read_gb_per_second: float
    release: int = 12
    persistent: bool = False
    ptx: bool = False


@dataclass(frozen=True)
class Target:
    """A target, as its TOML describes it.

    ``isa`` names the file of schedules/isa/ whose primitives the kernels use; ``llvm`` is TVM's
    target dict; ``link`` is the triple ziglang links for; ``requires`` lists the CPU features the
    library checks before it runs, named as in codegen/runtime/cpu.c. ``read_gb_per_second`` is what
    one core typically reads from memory: estimates are made with it, nothing else. With ``cuda``
    the kernels run on a GPU, and ``isa`` is "cuda"; the library around them is for ``arch`` still.
    """

    name: str
    description: str
    isa: str
    arch: str  # "x86_64", "aarch64" or "riscv64"
    llvm: dict[str, Any]
    link: str
    requires: tuple[str, ...]
    read_gb_per_second: float | None = None
    cuda: CudaTarget | None = None

    def with_persistent_kernel(self) -> Target:
        """The same, a decoded token one kernel; unchanged where it has no GPU."""
        if self.cuda is None:
            return self
        return replace(self, cuda=replace(self.cuda, persistent=True))

    @cached_property
    def tvm(self) -> Any:
        """TVM's target, the host part included."""
        import tvm  # a session asks for targets, too, and must not wait for TVM

        target = tvm.target.Target(self.llvm)
        return target.with_host(target)

    @staticmethod
    def load(name: str) -> Target:
        """The target called ``name``: "host", a file of targets/, or a path to one's own TOML.

        Raises TargetError where there is none, or its file lacks or misspells a field.
        """
        if name == "host":
            return host_target()
        path = Path(name)
        if path.suffix == ".toml":
            return _parse(read_text(path, _MAX_TOML_BYTES, TargetError), str(path))
        known = ["host", *known_targets(), *known_targets(cuda=True)]
        if name not in known:
            raise TargetError(
                f"unknown target; known are {', '.join(known)}, or give the path of a TOML file"
                + did_you_mean(name, known),
                where=name,
            )
        return _parse(
            (_folder() / f"{name}.toml").read_text(encoding="utf-8"), f"targets/{name}.toml"
        )


def host_target(machine: str | None = None, cpuinfo: str | None = None) -> Target:
    """The target of the machine that this runs on, or of one with this ``cpuinfo``.

    Raises TargetError where the architecture is unknown or the CPU is older than every target.
    """
    machine = machine or platform.machine()
    names = host.candidates(machine)
    features = host.cpu_features(host.cpuinfo() if cpuinfo is None else cpuinfo)
    for name in names:
        target = Target.load(name)
        if not host.missing(target.requires, features):
            return target
    raise TargetError(
        f"this {machine} CPU lacks what the targets {', '.join(names)} need", where="host"
    )


def known_targets(*, cuda: bool = False) -> list[str]:
    """Names of the targets that come with slmtvm: of CPUs, or of GPUs."""
    return sorted(
        path.name[:-5]
        for path in _folder().iterdir()
        if path.name.endswith(".toml")
        and cuda == ("cuda" in tomllib.loads(path.read_text(encoding="utf-8")))
    )


def _folder() -> Any:
    return resources.files("slmtvm.targets")


def _parse(text: str, where: str) -> Target:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"not valid TOML: {error}", where=where) from error
    if not _FIELDS.keys() <= table.keys() <= _FIELDS.keys() | _OPTIONAL.keys():
        raise TargetError(
            f"fields must be {', '.join(sorted(_FIELDS))}, and may be {', '.join(_OPTIONAL)}; "
            f"missing: {', '.join(sorted(_FIELDS.keys() - table.keys())) or 'none'}; "
            f"unknown: {', '.join(sorted(table.keys() - {*_FIELDS, *_OPTIONAL})) or 'none'}",
            where=where,
        )
    for field, type_ in {**_FIELDS, **_OPTIONAL}.items():
        if field in table and not isinstance(table[field], type_):
            raise TargetError(f"{field} must be {_TOML_NAMES[type_]}", where=where)
    if table["arch"] not in ARCHITECTURES:
        raise TargetError(
            f"arch is {table['arch']!r}; it must be one of {', '.join(ARCHITECTURES)}", where=where
        )
    if "cuda" in table:
        table["cuda"] = _parse_cuda(table["cuda"], where)
    if (table["isa"] == "cuda") != ("cuda" in table):
        raise TargetError('the isa "cuda" and a table [cuda] need each other', where=where)
    return Target(**{**table, "requires": tuple(table["requires"])})


def _parse_cuda(table: dict[str, Any], where: str) -> CudaTarget:
    fields = {**_CUDA_FIELDS, **{n: t for n, t in _CUDA_OPTIONAL.items() if n in table}}
    wrong = [n for n, type_ in fields.items() if type(table.get(n)) is not type_]
    unknown = sorted(table.keys() - fields)
    release = table.get("release", CUDA_RELEASES[0])
    if wrong or unknown or table["multiprocessors"] < 1 or release not in CUDA_RELEASES:
        must, may = (
            ", ".join(f"{name} ({_TOML_NAMES[t]})" for name, t in which.items())
            for which in (_CUDA_FIELDS, _CUDA_OPTIONAL)
        )
        raise TargetError(
            f"[cuda] must have {must}, may have {may}, and nothing else; release is one of "
            f"{', '.join(map(str, CUDA_RELEASES))}",
            where=where,
        )
    return CudaTarget(**table)
