"""This machine as a device, or an emulator on it: a runner of one's own, without a tracker."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from slmtvm.errors import RpcError
from slmtvm.rpc import slm_runner
from slmtvm.rpc.client import Device


@contextmanager
def local_device(*options: str) -> Iterator[Device]:
    """A device behind a runner that lives as long as this context, under the same limits as any.

    options: those of the runner, such as "--cores", "0-1", or "--exec", "qemu-riscv64-static".
    Raises RpcError where the runner does not start.
    """
    from tvm import rpc

    key = secrets.token_hex(16)  # of this user's processes only this one shall be a client
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
    process = subprocess.Popen(
        [sys.executable, slm_runner.__file__, "--leash", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    try:
        said = process.stdout.readline().strip()
        if not said:
            words = process.stderr.read().strip().splitlines()
            raise RpcError(
                f"does not start: {words[-1] if words else 'it says nothing'}",
                where="runner on this machine",
            )
        yield int(said)
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()
