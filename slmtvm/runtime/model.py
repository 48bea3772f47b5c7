"""An open bundle: the library that fits this machine, and its mapped weights."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmtvm.bundle.manifest import CUDA, TargetEntry
from slmtvm.bundle.read import Bundle
from slmtvm.bundle.weights_key import (
    KEY_BYTES,
    may_swap,
    read_weights_key,
    weights_key_of_environment,
)
from slmtvm.errors import BundleError, DeviceError, SlmError
from slmtvm.host import cpu_features, cpuinfo, missing
from slmtvm.runtime.fastest import Fastest, read_fastest
from slmtvm.runtime.interface import (
    ALL_THREADS,
    MAY_SWAP,
    PROFILE,
    SKIP_CHECKSUM,
    KernelTime,
    Library,
    Options,
)
from slmtvm.runtime.tokenizer import CompiledTokenizer

_MAX_THREADS = 256  # SLM_MAX_THREADS of pool.h


class Model:
    """A bundle's library and weights, open; sessions are made from it by ``Session``."""

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        cores: str | None = None,
        target: str | None = None,
        check: bool = True,
        profile: bool = False,
        all_threads: bool = False,
        pub: str | Path | Sequence[str | Path] | None = None,
        least_counter: int = 0,
        weights_key: str | bytes | None = None,
    ) -> None:
        """Open the bundle ``path`` for ``target``, by default the best one for this machine.

        ``threads``: the most that compute; no more are started than there are cores for (affinity,
        the control group's quota), and 0 means as many as that, of cores that differ in speed the
        fast ones. ``cores`` ("4-7,9") binds them, and the calling thread, to these. ``how`` then
        says what was chosen and why, and under "no_gpu" why not the GPU that the bundle has code
        for, if it could not be used or ``slmtvm bench`` found a CPU's library faster here.
        ``all_threads`` starts and uses as many as asked for, whatever that costs: for tests.
        ``check`` reads all weights once and compares their checksum.
        ``profile`` measures each kernel, for ``take_profile``. A library whose SHA-256 is not the
        manifest's is never loaded. ``pub``: PEM files of the Ed25519 public keys that are trusted;
        with them the bundle must be signed by one, every file that is used be what was signed,
        whatever ``check`` is, and the release's counter at least ``least_counter``;
        SignatureError where not. ``weights_key``: of encrypted weights, 32 bytes or where they come
        from (``slmtvm.bundle.weights_key``); by default the variable SLM_WEIGHTS_KEY says that.
        Decrypted weights are locked in memory, unless SLM_WEIGHTS_MAY_SWAP is 1. Raises BundleError
        where the bundle is missing, damaged or has nothing for this machine, DeviceError where it
        cannot run here or the key is not the one.
        """
        if not 0 <= threads <= _MAX_THREADS:
            raise DeviceError(f"threads is {threads}, must be 0 to {_MAX_THREADS}")
        keys = None
        if pub is not None:
            from slmtvm.bundle.signature import PublicKeys

            keys = PublicKeys.read(pub)
        self.bundle = Bundle.open(path, keys, least_counter=least_counter)
        key = _key(weights_key) if self.bundle.encrypted else None
        flags = (0 if check else SKIP_CHECKSUM) | (PROFILE if profile else 0)
        flags |= ALL_THREADS if all_threads else 0
        listed = None if cores is None else os.fsencode(cores)
        options = Options(ctypes.sizeof(Options), threads, flags, listed)
        if keys is not None:
            options.public_keys, options.least_counter = keys.pem.encode(), least_counter
        if self.bundle.encrypted:
            options.flags |= MAY_SWAP if may_swap() else 0
            options.weights_key = key
        features = _host_features()
        self.target = target or self._best(features)
        fastest = None if target else self._faster_than_gpu(features)
        if fastest is not None:
            self.target = fastest.library
        try:
            self._open(options)
        except DeviceError as error:
            # A driver alone is no GPU that can run this. Where it cannot, a CPU can.
            without = features - {CUDA}
            if target or CUDA not in self.bundle.manifest.targets[self.target].requires:
                raise
            self.target = self._best(without)
            self._open(options)
            self.how["no_gpu"] = str(error)
        if fastest is not None:
            self.how["no_gpu"] = fastest.why

    def _faster_than_gpu(self, features: set[str]) -> Fastest | None:
        """A library that runs here and was found faster than that of the GPU, which ``target`` is;
        None where it is none, or nothing was found."""
        targets = self.bundle.manifest.targets
        if CUDA not in targets[self.target].requires:
            return None
        found = read_fastest(self.bundle)
        if found is None or missing(targets[found.library].requires, features - {CUDA}):
            return None
        return found if targets[found.library].arch == platform.machine() else None

    def _best(self, features: set[str]) -> str:
        entries = {name: self.bundle.manifest.targets[name] for name in self.bundle.targets}
        return choose_target(entries, platform.machine(), features, f"{self.bundle.path}")

    def _open(self, options: Options) -> None:
        self.library = Library(self.bundle.library(self.target))
        self.info: dict[str, Any] = json.loads(self.library.info())
        self.handle = ctypes.c_void_p()
        try:
            self.library.call(
                "slm_open",
                os.fsencode(self.bundle.path),
                ctypes.byref(options),
                ctypes.byref(self.handle),
            )
        except SlmError:
            self.library.close()
            raise
        self.how: dict[str, Any] = json.loads(self.library.model_info(self.handle))

    def take_profile(self) -> dict[str, KernelTime]:
        """Calls and nanoseconds since the last time, by the name of the kernel.

        Raises DeviceError where the model was opened without ``profile``.
        """
        names = [kernel["name"] for kernel in self.info["kernels"]]
        times = (KernelTime * len(names))()
        self.library.call("slm_profile", self.handle, times, len(names))
        return dict(zip(names, times, strict=True))

    def compiled_tokenizer(self) -> CompiledTokenizer:
        """The tokenizer that devices use; raises BundleError where the bundle has none.

        It must be closed before the model is.
        """
        self.bundle.tokenizer_tables()
        return CompiledTokenizer(self.library, self.bundle.path)

    def close(self) -> None:
        """End the workers and unmap the weights; raises DeviceError while sessions are left."""
        if self.handle:
            self.library.call("slm_close", self.handle)
            self.handle = ctypes.c_void_p()
            self.library.close()


def _key(given: str | bytes | None) -> bytes | None:
    """The key that ``given`` is or leads to; of the environment where it is None."""
    key = read_weights_key(given) if isinstance(given, str) else given
    if key is None:
        return weights_key_of_environment()
    if len(key) != KEY_BYTES:
        raise SlmError(f"weights_key has {len(key)} bytes, must have {KEY_BYTES}")
    return key


def choose_target(
    targets: Mapping[str, TargetEntry], machine: str, features: set[str], where: str
) -> str:
    """The target that asks for most of what a machine with ``features`` has, and nothing else; one
    that runs on a GPU before all others."""
    fitting = [
        name
        for name, entry in targets.items()
        if entry.arch == machine and not missing(entry.requires, features)
    ]
    if not fitting:
        raise BundleError(
            f"nothing here runs on this {machine} CPU: there are libraries for "
            + ", ".join(
                f"{name} ({' '.join((entry.arch, *entry.requires))})"
                for name, entry in targets.items()
            )
            + "; compile the model with --target host",
            where=where,
        )
    return max(
        fitting,
        key=lambda name: (CUDA in targets[name].requires, len(targets[name].requires), name),
    )


def gpu_and_cpu(bundle: Bundle) -> tuple[str, str] | None:
    """The targets that ``Model`` would take with a GPU and without, where a driver is here; None
    where the bundle has no libraries for both."""
    features = _host_features()
    targets = {name: bundle.manifest.targets[name] for name in bundle.targets}
    where, machine = f"{bundle.path}", platform.machine()
    try:
        gpu = choose_target(targets, machine, features, where)
        cpu = choose_target(targets, machine, features - {CUDA}, where)
    except BundleError:
        return None
    return None if gpu == cpu else (gpu, cpu)


def _host_features() -> set[str]:
    """Of the CPU, and ``CUDA`` where there is a driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return cpu_features(cpuinfo())
    return cpu_features(cpuinfo()) | {CUDA}
