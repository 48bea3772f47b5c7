"""Plain connections on loopback that go on inside TLS: TVM's client speaks no TLS, and need not.

    TVM's client --tcp--> relay ==TLS==> front of the tracker, or runner

A relay is a process of its own: while TVM waits for an answer it may hold Python's lock, so that no
thread beside it could fetch one. To a runner it takes one connection; to a tracker any number, and
opens a port for every runner whose address the tracker hands out. Other users of this machine reach
these ports too: a runner's needs the key of its session besides, a tracker's does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from slmtvm.errors import RpcError, SlmError
from slmtvm.rpc.keygen import role_folder
from slmtvm.rpc.leash import Leashed
from slmtvm.rpc.slm_runner import LARGEST_ANSWER, SetupError, tls_context

LOOPBACK = "127.0.0.1"
HANDSHAKE_SECONDS = 5.0
_CHUNK = 1 << 16

Rewrite = Callable[[Any], Awaitable[Any]]
Ready = Callable[[int], None]


def relay_to_runner(host: str, port: int, tls: Path) -> Leashed:
    """A process that leads one connection to the runner at ``host``; ``said`` is its port."""
    command = [sys.executable, "-m", "slmtvm.rpc.relay", host, str(port), str(tls)]
    return Leashed(command, f"relay to {host}:{port}")


def run_tracker_relay(host: str, port: int, tls: Path, local_port: int, ready: Ready) -> None:
    """Lead connections to ``local_port`` to the tracker at ``host``, until this process is ended.

    ready: told the port, another one where 0 was asked for. Raises RpcError where the keys cannot
    be read, OSError where the port is taken.
    """
    context = client_context(tls)

    async def runner(answer: Any) -> Any:
        match answer:
            case [0, [str(address), int(other), str(key)]]:
                local = await listen_once(address, other, context)
                return [0, [LOOPBACK, local, key]]
        return answer

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await join(reader, writer, (host, port, "tracker"), context, runner)

    async def serve() -> None:
        server = await asyncio.start_server(pass_on, LOOPBACK, local_port)
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def listen_once(host: str, port: int, context: Any) -> int:
    """Lead one connection to the runner at ``host``; the port on loopback where it is taken."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        await join(reader, writer, (host, port, "runner"), context)

    server = await asyncio.start_server(pass_on, LOOPBACK, 0)
    return int(server.sockets[0].getsockname()[1])


async def join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    where: tuple[str, int, str],
    context: Any,
    rewrite: Rewrite | None = None,
) -> None:
    """Pass bytes both ways between a client and a new connection to ``where``: host, port, role."""
    host, port, role = where
    try:
        other_reader, other_writer = await asyncio.wait_for(
            asyncio.open_connection(host, port, ssl=context, server_hostname=role),
            HANDSHAKE_SECONDS,
        )
    except (OSError, asyncio.TimeoutError) as error:
        why = error or "it does not answer"
        print(f"no TLS with the {role} at {host}:{port}: {why}", file=sys.stderr, flush=True)
        await end(writer)
        return
    back = (
        copy_messages(other_reader, writer, rewrite, greeting=4)
        if rewrite
        else copy(other_reader, writer)
    )
    await asyncio.gather(copy(reader, other_writer), back)


def client_context(tls: Path) -> Any:
    """A tuner's context as a client. Raises RpcError where the keys cannot be read."""
    try:
        return tls_context(str(role_folder(tls, "tuner")), server=False)
    except SetupError as error:
        raise RpcError(f"{error}; slmtvm rpc keygen makes a tuner's keys") from error


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until one side has gone."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    await end(writer)


async def copy_messages(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rewrite: Rewrite, *, greeting: int
) -> None:
    """Pass a tracker's messages on, each through ``rewrite``; ``greeting`` bytes go before them."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
        writer.write(await reader.readexactly(greeting))
        await writer.drain()
        while True:
            (size,) = struct.unpack("<i", await reader.readexactly(4))
            if not 0 < size <= LARGEST_ANSWER:
                break
            message = await rewrite(json.loads(await reader.readexactly(size)))
            data = json.dumps(message).encode()
            writer.write(struct.pack("<i", len(data)) + data)
            await writer.drain()
    await end(writer)


async def end(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and see what that raises."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def main(host: str, port: str, tls: str) -> None:
    """Lead one connection to a runner, until standard input ends."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def leave() -> None:
            if not os.read(0, 1 << 10) and not ended.done():
                ended.set_result(None)

        loop.add_reader(0, leave)
        print(await listen_once(host, int(port), client_context(Path(tls))), flush=True)
        await ended

    try:
        asyncio.run(serve())
    except (SlmError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
