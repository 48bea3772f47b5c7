"""Plain connections on loopback that go on inside TLS: TVM's client speaks no TLS, and need not.

    TVM's client --tcp--> Relay ==TLS==> front of the tracker, or runner

Each relay runs an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from slmtvm.errors import RpcError
from slmtvm.rpc.slm_runner import LARGEST_ANSWER, tls_context

LOOPBACK = "127.0.0.1"
HANDSHAKE_SECONDS = 5.0
_CHUNK = 1 << 16

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Rewrite = Callable[[Any], Awaitable[Any]]


class Relay:
    """A port on loopback that leads somewhere through TLS, until ``close``.

    ``to_runner`` takes one connection, ``to_tracker`` any number. Other users of this machine reach
    the port too: the first needs the key of its session besides, the second does not.
    """

    def __init__(self, serve: Callable[[Relay], Serve], port: int = 0) -> None:
        self.why = ""
        """Why the last connection failed."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        starting = self.listen(serve(self), port)
        self.server, self.port = asyncio.run_coroutine_threadsafe(starting, self.loop).result()

    @staticmethod
    def to_runner(host: str, port: int, tls: Path) -> Relay:
        """To the runner at ``host``, who must show a runner's certificate."""
        context = tls_folder_context(tls, "tuner")

        def serve(relay: Relay) -> Serve:
            async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                relay.server.close()  # the port is for one connection
                await relay.join(reader, writer, host, port, context, "runner")

            return pass_on

        return Relay(serve)

    @staticmethod
    def to_tracker(host: str, port: int, tls: Path, *, local_port: int = 0) -> Relay:
        """To the tracker at ``host``; the runners whose addresses it hands out are reached through
        relays too."""
        context = tls_folder_context(tls, "tuner")

        def serve(relay: Relay) -> Serve:
            async def runner(answer: Any) -> Any:
                match answer:
                    case [0, [str(address), int(other), str(key)]]:

                        async def pass_on(
                            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
                        ) -> None:
                            server.close()
                            await relay.join(reader, writer, address, other, context, "runner")

                        server, local = await relay.listen(pass_on, 0)
                        return [0, [LOOPBACK, local, key]]
                return answer

            async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await relay.join(reader, writer, host, port, context, "tracker", runner)

            return pass_on

        return Relay(serve, local_port)

    def close(self) -> None:
        """End all connections."""

        async def end() -> None:
            self.server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    async def listen(self, serve: Serve, port: int) -> tuple[asyncio.Server, int]:
        server = await asyncio.start_server(serve, LOOPBACK, port)
        return server, int(server.sockets[0].getsockname()[1])

    async def join(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        port: int,
        context: Any,
        role: str,
        rewrite: Rewrite | None = None,
    ) -> None:
        """Pass bytes both ways between a client and a new connection to ``role`` at ``host``."""
        try:
            other_reader, other_writer = await asyncio.wait_for(
                asyncio.open_connection(host, port, ssl=context, server_hostname=role),
                HANDSHAKE_SECONDS,
            )
        except (OSError, asyncio.TimeoutError) as error:
            self.why = f"no TLS with the {role} at {host}:{port}: {error or 'it does not answer'}"
            writer.close()
            return
        back = (
            copy_messages(other_reader, writer, rewrite, greeting=4)
            if rewrite
            else copy(other_reader, writer)
        )
        await asyncio.gather(copy(reader, other_writer), back)

    def _work(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


def tls_folder_context(tls: Path, role: str) -> Any:
    """A client's context of ``role``, from a folder of keys. Raises RpcError where it is none."""
    try:
        return tls_context(str(tls), server=False)
    except SystemExit as error:
        raise RpcError(f"{error}; slmtvm rpc keygen makes the keys of a {role}") from error


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
