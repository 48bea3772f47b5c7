"""TVM's tracker behind a door of our own, all in one process.

TVM's listens for everybody, believes what it is told, and leaves a child behind when it is ended.
Here its message loop serves only connections that have come through ``Front``: over TLS where there
are keys, with a greeting and messages that are well-formed, each from who may send it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmtvm.errors import RpcError
from slmtvm.rpc.keygen import role_folder
from slmtvm.rpc.relay import HANDSHAKE_SECONDS, copy, end
from slmtvm.rpc.slm_runner import (
    LARGEST_ANSWER,
    TRACKER_MAGIC,
    SetupError,
    device_key,
    keep_alive,
    tls_context,
)

_PING, _PUT, _REQUEST, _UPDATE_INFO, _SUMMARY, _PENDING = 1, 3, 4, 5, 6, 7
_MAY_SEND = {
    "runner": {_PING, _PUT, _UPDATE_INFO, _PENDING},
    "tuner": {_PING, _REQUEST, _SUMMARY},
}
_MOST_CONNECTIONS = 1000


def run_tracker(
    host: str = "127.0.0.1",
    port: int = 9190,
    *,
    tls: Path | None = None,
    ready: Callable[[str, int], None] = lambda _host, _port: None,
) -> None:
    """Serve until this process is ended.

    tls: the tracker's keys, or what ``keygen`` wrote; without, everybody who reaches the port may
    register devices and take them. ready: told the address; the port is another one where 0 was
    asked for. Raises RpcError where TVM's tracker cannot be had or the keys cannot be read, OSError
    where the port is taken.
    """
    context = None
    if tls:
        try:
            context = tls_context(str(role_folder(tls, "tracker")), server=True)
        except SetupError as error:
            raise RpcError(str(error)) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=128) as listener:
        asyncio.run(_serve(listener, context, ready))


async def _serve(
    listener: socket.socket, context: ssl.SSLContext | None, ready: Callable[[str, int], None]
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_failure)
    front = Front(context)
    listener.setblocking(False)
    ready(*listener.getsockname()[:2])
    tasks: set[asyncio.Task[None]] = set()
    while True:
        try:
            sock, peer = await loop.sock_accept(listener)
        except OSError as error:  # no more descriptors, perhaps for a moment
            _log(f"cannot accept: {error}")
            await asyncio.sleep(0.1)
            continue
        task = loop.create_task(front.admit(sock, peer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class Front:
    """Hands connections on to TVM's tracker, message by message."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._tracker, self._connection = _tvm_tracker()
        self._count = 0

    async def admit(self, sock: socket.socket, peer: Any) -> None:
        """Serve one connection to its end."""
        self._count += 1
        try:
            if self._count > _MOST_CONNECTIONS:
                raise ValueError(f"there are {_MOST_CONNECTIONS} others already")
            keep_alive(sock)
            reader, writer = await self._greet(sock)
            try:
                await self._serve(reader, writer, peer)
            finally:
                await end(writer)
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            _log(f"refused {peer[0]}:{peer[1]}: {str(error) or type(error).__name__}")
        finally:
            self._count -= 1
            sock.close()

    async def _greet(
        self, sock: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection, after the TLS handshake; OSError where that fails.

        asyncio.start_server would do it, and keep silent about those that fail.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        seconds = HANDSHAKE_SECONDS if self._context else None
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, sock, ssl=self._context, ssl_handshake_timeout=seconds
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Any
    ) -> None:
        allowed = self._allowed(writer)
        greeting = await asyncio.wait_for(reader.readexactly(4), HANDSHAKE_SECONDS)
        if greeting != struct.pack("<i", TRACKER_MAGIC):
            raise ValueError("it speaks no tracker's protocol")
        ours, theirs = socket.socketpair()
        self._connection(self._tracker, theirs, (peer[0], peer[1]))
        inner_reader, inner_writer = await asyncio.open_connection(sock=ours)
        back = asyncio.ensure_future(copy(inner_reader, writer))
        try:
            inner_writer.write(greeting)  # alone: TVM's closes where its first read is not 4 bytes
            await _pass_messages(reader, inner_writer, allowed)
        finally:
            back.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await back
            await end(inner_writer)

    def _allowed(self, writer: asyncio.StreamWriter) -> set[int]:
        if not self._context:
            return set().union(*_MAY_SEND.values())
        names = (writer.get_extra_info("peercert") or {}).get("subjectAltName", ())
        roles = [name for kind, name in names if kind == "DNS"]
        return set().union(*(_MAY_SEND.get(role, set()) for role in roles))


async def _pass_messages(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: set[int]
) -> None:
    """Until the peer has gone; ValueError where it sends what it may not."""
    while True:
        try:
            head = await reader.readexactly(4)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return
        (size,) = struct.unpack("<i", head)
        if not 0 < size <= LARGEST_ANSWER:
            raise ValueError(f"a message of {size} bytes")
        body = await reader.readexactly(size)
        check_message(json.loads(body), allowed)
        writer.write(head + body)
        await writer.drain()


def check_message(message: Any, allowed: set[int]) -> None:
    """ValueError where a message to the tracker is not one of those codes, or malformed."""
    code = message[0] if isinstance(message, list) and message else None
    if not isinstance(code, int) or isinstance(code, bool) or code not in allowed:
        raise ValueError(f"a message with code {str(code)[:20]!r}, which it may not send")
    match message:
        case [1 | 6 | 7]:  # ping, summary, pending keys
            return
        case [3, str(key), [int(port), str(match)], (str() | None)]:
            well = match.rpartition(":")[0] == key and _is_key(key) and 0 < port < 65536
        case [4, str(key), str(), int()]:
            well = _is_key(key)
        case [5, {"key": str(key), "addr": [(str() | None), int(port)]}]:
            kind, _, name = key.partition(":")
            well = kind == "server" and _is_key(name) and 0 < port < 65536
        case _:
            well = False
    if not well:
        raise ValueError(f"a malformed message with code {code}")


def _is_key(text: str) -> bool:
    with contextlib.suppress(Exception):
        return device_key(text) == text
    return False


def _tvm_tracker() -> tuple[Any, Any]:
    """TVM's tracker, on a port that nobody is told and that is closed, and its class of
    connections."""
    try:
        from tvm.rpc import tracker
    except ImportError as error:
        raise RpcError(
            "TVM's tracker needs tornado: pip install 'slmtvm[rpc]'", where="slmtvm rpc tracker"
        ) from error
    tracker.logger.setLevel(logging.ERROR)  # its tracebacks are of messages that we let through
    unused = socket.create_server(("127.0.0.1", 0))
    made = tracker.TrackerServerHandler(unused, "")
    made._ioloop.remove_handler(unused.fileno())
    unused.close()
    return made, tracker.TCPEventHandler


def _log(text: str) -> None:
    print(text[:300], file=sys.stderr, flush=True)


def _log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    del loop
    error = context.get("exception")
    _log(f"refused: {error or context.get('message')}".splitlines()[0])
