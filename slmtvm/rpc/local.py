"""This machine as a device, or an emulator on it: a runner of one's own, without a tracker."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from slmtvm.errors import RpcError
from slmtvm.rpc import slm_runner
from slmtvm.rpc.client import Device
from slmtvm.rpc.leash import Leashed


@contextmanager
def local_device(*options: str) -> Iterator[Device]:
    """A device behind a runner that lives as long as this context, under the same limits as any.

    options: those of the runner, such as "--cores", "0-1", or "--exec", "qemu-riscv64-static".
    Raises RpcError where the runner does not start.
    """
    from tvm import rpc

    key = secrets.token_hex(16)  # nobody else shall be a client
    with own_runner(["--key", key, *options]) as port:
        try:
            remote = rpc.connect("127.0.0.1", port, key)
        except Exception as error:
            raise RpcError(f"does not answer: {error}", where="runner on this machine") from error
        with Device(remote, "local", f"127.0.0.1:{port}") as device:
            del remote
            yield device


@contextmanager
def own_runner(options: Sequence[str]) -> Iterator[int]:
    """A runner in a process that ends with this context, and with this process; its port."""
    command = [sys.executable, slm_runner.__file__, "--leash", *options]
    with Leashed(command, "runner on this machine") as process:
        yield int(process.said)
