#!/usr/bin/env python3
"""The runner: one file, Python's standard library (3.8 and later) alone, all that a board needs.

    python3 slm_runner.py --tracker HOST:PORT --key cortex-a78 [--tls DIR]

It registers with a TVM tracker and serves stock TVM 0.27 clients, one at a time (RPC protocol
"0.8.0"). What a client uploads is a static executable; each call runs it in a process of its own,
under limits, directly or through ``--exec "qemu-riscv64-static -cpu ..."``. ``--exec "ssh board"``
and ``--exec "adb shell"`` run it on a board that needs nothing but a shell:

- kernels called or timed through ``load_module``: the executable reads a request from its standard
  input and answers on its standard output (slmtvm/rpc/child/main.c says how);
- ``slm.job.run``: any program, with arguments and standard input, for its status and its output.

A crash, a hang or a hunger for memory of that process is one error to the client.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import pwd
import queue
import re
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

MAGIC, MISMATCH, TRACKER_MAGIC, VERSION = 0xFF271, 0xFF273, 0x2F271, "0.8.0"
# RPCCode of TVM 0.27
SHUTDOWN, INIT, CALL, RETURN, EXCEPTION, COPY_FROM, COPY_TO, COPY_ACK = range(1, 9)
(GET_GLOBAL, FREE_HANDLE, SET_DEVICE, GET_ATTR, ALLOC, FREE, SYNC, COPY_AMONG, ALLOC_SCOPED,
 NEW_STREAM, FREE_STREAM, SET_STREAM, GET_STREAM) = range(9, 22)  # fmt: skip
# TVMFFITypeIndex
NONE, INT, BOOL, FLOAT, OPAQUE, DTYPE, DEVICE, DLTENSOR, RAW_STR, BYTE_ARRAY = range(10)
SMALL_STR, SMALL_BYTES, STR, BYTES, FUNCTION, MODULE = 11, 12, 65, 66, 68, 73
# DLDataTypeCode
SIGNED, UNSIGNED, FLOATING, BFLOAT, BOOLEAN = 0, 1, 2, 4, 6
# TrackerCode
SUCCESS, PUT, UPDATE_INFO, PENDING_KEYS = 0, 3, 5, 7

CPU = 1
LARGEST_DIMENSIONS = 32
LARGEST_GREETING = 1000  # bytes of a client's key and options
LARGEST_ANSWER = 1 << 20  # bytes of a tracker's message
LARGEST_OUTPUT = 64 << 20  # bytes of a job's standard output
STDERR_TAIL = 4000  # bytes of a job's standard error that are kept
MOST_OBJECTS = 100_000  # functions and modules that a session may hold
HANDSHAKE_SECONDS = 5.0
MOST_HANDSHAKES = 32  # at a time; more are turned away unheard
POLL_SECONDS = 2.0  # between questions to the tracker whether our offer still stands
UNCLAIMED_POLLS = 4  # after which the client that was given our offer is taken for lost
IDLE_SECONDS = 3600.0  # without a packet, after which a session ends
REST_SECONDS = 60.0  # that a job waits at most for the device to cool down

Deadline = Optional[float]  # of time.monotonic()


class JobError(Exception):
    """Told to the client as the answer to its call; the session goes on."""


class SetupError(Exception):
    """This runner cannot be started so, or these keys cannot be used."""


class PeerError(Exception):
    """The connection is of no more use."""


def log(text: str) -> None:
    """One line to standard error; what a peer wrote must have gone through repr()."""
    print(time.strftime("%H:%M:%S"), text[:500], file=sys.stderr, flush=True)


# --- values on the wire


class Pointer(int):
    """A value of type OpaquePtr."""


class Handle(NamedTuple):
    """What a call returns for a new object."""

    kind: int  # FUNCTION or MODULE
    number: int


class Tensor(NamedTuple):
    """A DLTensor as it comes over the wire; ``data`` is the number of one of our buffers."""

    data: int
    device: tuple[int, int]
    shape: tuple[int, ...]
    code: int
    bits: int
    lanes: int
    offset: int

    @property
    def nbytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return (count * self.bits * self.lanes + 7) // 8


class Reader:
    """Reads one packet; raises PeerError where it ends within a value or has no meaning."""

    def __init__(self, data: bytearray) -> None:
        self.data, self.at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        if self.at + count > len(self.data):
            raise PeerError("a packet ends within a value")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def one(self, form: str) -> Any:
        return self.unpack(form)[0]

    def text(self) -> memoryview:
        return self.take(self.one("Q"))

    def tensor(self) -> Tensor:
        data, kind, index, ndim = self.unpack("Qiii")
        code, bits, lanes = self.unpack("BBH")
        if not 0 <= ndim <= LARGEST_DIMENSIONS:
            raise PeerError(f"a tensor of {ndim} dimensions")
        shape = self.unpack(f"{ndim}q")
        if any(extent < 0 for extent in shape):
            raise PeerError("a tensor with a negative extent")
        return Tensor(data, (kind, index), shape, code, bits, lanes, self.one("Q"))

    def values(self) -> list[Any]:
        count = self.one("i")
        return [self.value() for _ in range(count)]

    def value(self) -> Any:
        kind = self.one("i")
        if kind == NONE:
            return None
        if kind in (INT, BOOL):
            return self.one("q")
        if kind == FLOAT:
            return self.one("d")
        if kind == OPAQUE:
            return Pointer(self.one("Q"))
        if kind == DTYPE:
            return self.unpack("BBHi")[:3]
        if kind == DEVICE:
            return self.unpack("ii")
        if kind == DLTENSOR:
            return self.tensor()
        if kind in (FUNCTION, MODULE):
            return Handle(kind, self.one("Q"))
        if kind == RAW_STR:
            return str(self.text(), "utf-8")
        if kind == BYTE_ARRAY:
            return self.text()
        # Objects carry their type a second time, as uint32; small strings say 65 there, not 11.
        if kind in (SMALL_STR, STR, SMALL_BYTES, BYTES):
            inner, data = self.one("I"), self.text()
            return str(data, "utf-8") if inner == STR else data
        raise PeerError(f"unknown type index {kind}")


def encode(value: Any) -> bytes:
    """One value of a packed sequence: type index and content."""
    if value is None:
        return struct.pack("<i", NONE)
    if isinstance(value, Pointer):
        return struct.pack("<iQ", OPAQUE, value)
    if isinstance(value, bool):
        return struct.pack("<iq", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<iq", INT, value)
    if isinstance(value, float):
        return struct.pack("<id", FLOAT, value)
    kind = RAW_STR if isinstance(value, str) else BYTE_ARRAY
    data = value.encode() if isinstance(value, str) else bytes(value)
    return struct.pack("<iQ", kind, len(data)) + data


def sequence(*values: Any) -> bytes:
    return struct.pack("<i", len(values)) + b"".join(map(encode, values))


def returned(value: Any) -> bytes:
    """The answer to CALL: the type index as an Int, then the value; even None is two values."""
    if isinstance(value, Handle):
        return sequence(value.kind, Pointer(value.number))
    kinds = {type(None): NONE, bool: BOOL, int: INT, float: FLOAT, Pointer: OPAQUE}
    kind = kinds.get(type(value), STR if isinstance(value, str) else BYTES)
    return sequence(kind, value)


# --- connections


def remaining(deadline: Deadline) -> float | None:
    """Seconds until ``deadline``; raises socket.timeout where there are none."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout("the time is over")
    return left


def receive(sock: socket.socket, count: int, deadline: Deadline = None) -> bytearray:
    """Exactly ``count`` bytes, or PeerError, or socket.timeout at ``deadline``.

    Memory is taken as data comes, not as a header announces it.
    """
    data = bytearray()
    while len(data) < count:
        sock.settimeout(remaining(deadline))
        got = sock.recv(min(count - len(data), 1 << 20))
        if not got:
            raise PeerError("the other side has gone")
        data += got
    return data


def tls_context(folder: str, server: bool) -> Any:
    """A context that speaks TLS 1.3 alone and wants the other side's certificate of the same CA.

    folder: holds ca.pem, cert.pem and key.pem, as ``slmtvm rpc keygen`` writes them.
    """
    try:
        import ssl
    except ImportError:
        raise SetupError("--tls needs Python's ssl module, which this Python lacks") from None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        made.load_cert_chain(os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem"))
        made.load_verify_locations(os.path.join(folder, "ca.pem"))
    except OSError as error:  # ssl.SSLError is one
        raise SetupError(f"{folder}: no ca.pem, cert.pem and key.pem of one CA: {error}") from None
    made.verify_mode = ssl.CERT_REQUIRED
    if server:
        made.num_tickets = 0  # every connection shows its certificate
    return made


def roles(sock: Any) -> list[str]:
    """What the other side's verified certificate is for: "tuner", "tracker" or "runner"."""
    names = (sock.getpeercert() or {}).get("subjectAltName", ())
    return [value for kind, value in names if kind == "DNS"]


def keep_alive(sock: socket.socket) -> None:
    """Notice within about a minute that the other machine has gone without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class TrackerLink:
    """A connection to a TVM tracker. Raises OSError or PeerError where there is none.

    where: (host, port). tls: a folder of keys, or None. timeout: seconds for each answer.
    """

    def __init__(self, where: tuple[str, int], tls: str | None = None, timeout: float = 20.0):
        context = tls_context(tls, server=False) if tls else None
        self.timeout = timeout
        sock = socket.create_connection(where, timeout=timeout)
        try:
            keep_alive(sock)
            if context:
                sock = context.wrap_socket(sock, server_hostname="tracker")
            self.sock = sock
            sock.sendall(struct.pack("<i", TRACKER_MAGIC))  # alone: more is sent after the answer
            if bytes(self._receive(4)) != struct.pack("<i", TRACKER_MAGIC):
                raise PeerError("this is not a TVM tracker")
        except BaseException:
            sock.close()
            raise

    def ask(self, what: Any) -> Any:
        """The answer to one message; both are JSON."""
        data = json.dumps(what).encode()
        try:
            self.sock.sendall(struct.pack("<i", len(data)) + data)
            (size,) = struct.unpack("<i", self._receive(4))
            if not 0 < size <= LARGEST_ANSWER:
                raise PeerError(f"the tracker sent a message of {size} bytes")
            return json.loads(self._receive(size).decode())
        except ValueError as error:
            raise PeerError(f"the tracker sent what is no JSON: {error}") from error

    def close(self) -> None:
        self.sock.close()

    def _receive(self, count: int) -> bytearray:
        return receive(self.sock, count, time.monotonic() + self.timeout)


# --- a job's process


class Limits(NamedTuple):
    """Of one process: bytes of memory and of a file, and whom it runs as."""

    memory: int
    disk: int
    user: str | None
    wrapper: list[str]  # what it is started through
    cores: list[int] | None = None  # on a board behind ssh or adb; here, all processes have them


class Outcome(NamedTuple):
    """How a process ended, and what it wrote."""

    status: int | None  # negative: the signal that ended it; None: it was killed by us
    reason: str  # why it was killed, or ""
    stdout: bytearray
    stderr: bytes  # its end
    seconds: float


# The limits are set by a shell, so that no code of this process runs between fork and exec.
LAUNCH = (
    'ulimit -c 0; ulimit -v "$1" && ulimit -f "$2" || { echo "no ulimit" >&2; exit 125; }; '
    'shift 2; exec "$@"'
)
BLOCK = 512  # bytes, the unit of ulimit -f


def run_process(
    command: Sequence[str],
    folder: str,
    limits: Limits,
    stdin: Sequence[bytes | bytearray | memoryview],
    deadline: float,
    stdout_limit: int,
    stop: Callable[[], str] = lambda: "",
) -> Outcome:
    """Run ``command`` in ``folder`` to its end, or until ``deadline`` or ``stop()`` says why not.

    It has a process group of its own, all of which is killed at the end.
    """
    words = ["sh", "-c", LAUNCH, "sh", str(limits.memory // 1024), str(limits.disk // BLOCK)]
    more: dict[str, Any] = {}
    if limits.user:
        group = pwd.getpwnam(limits.user).pw_gid
        more = {"user": limits.user, "group": group, "extra_groups": []}
    start = time.monotonic()
    process = subprocess.Popen(
        [*words, *limits.wrapper, *command], cwd=folder, env=child_environment(limits, folder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        start_new_session=True, **more,
    )  # fmt: skip
    stdout, tail, reason = bytearray(), bytearray(), ""
    try:
        for name in exchange(process, stdin, deadline):
            if isinstance(name, str):
                reason = name or stop()
            elif name[0] == "out":
                stdout += name[1]
                if len(stdout) > stdout_limit:
                    reason = f"it wrote more than {stdout_limit:,} bytes to its standard output"
            else:
                tail = (tail + name[1])[-STDERR_TAIL:]
            if reason:
                break
        seconds = time.monotonic() - start
    finally:
        kill_group(process)
    status = None if reason else process.returncode
    return Outcome(status, reason, stdout[:stdout_limit], bytes(tail), seconds)


def child_environment(limits: Limits, folder: str) -> dict[str, str]:
    """Of a job: nothing of ours but where programs are; what starts it through ssh may need all."""
    if limits.wrapper:
        return dict(os.environ)
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "TMPDIR": folder,
            "LC_ALL": "C"}  # fmt: skip


def exchange(
    process: Any, stdin: Sequence[bytes | bytearray | memoryview], deadline: float
) -> Iterator[str | tuple[str, bytes]]:
    """Write to a process and read from it until it ends: ("out" or "err", bytes), or every second
    "", or the reason to end it."""
    chunks = [memoryview(part).cast("B") for part in stdin if len(part)]
    with selectors.DefaultSelector() as selector:
        for stream, name in ((process.stdout, "out"), (process.stderr, "err")):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, name)
        os.set_blocking(process.stdin.fileno(), False)
        if chunks:
            selector.register(process.stdin, selectors.EVENT_WRITE, "in")
        else:
            process.stdin.close()
        last = time.monotonic()
        pause = 0.001
        while True:
            now = time.monotonic()
            if now >= deadline:
                yield "time"
                return
            if now - last > 1:
                last = now
                yield ""
            if selector.get_map():
                ready = selector.select(min(deadline - now, 1.0))
            else:  # all is read; it may still be running
                if has_ended(process.pid):
                    return
                time.sleep(min(pause, deadline - now))
                pause = min(2 * pause, 0.02)
                continue
            for entry, _events in ready:
                stream = entry.fileobj
                if entry.data == "in":
                    try:
                        chunks[0] = chunks[0][os.write(process.stdin.fileno(), chunks[0][:65536]) :]
                    except BlockingIOError:
                        continue
                    except OSError:  # it does not read what it is sent
                        chunks.clear()
                    if chunks and not len(chunks[0]):
                        chunks.pop(0)
                    if not chunks:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                data = os.read(entry.fd, 1 << 20)
                if data:
                    yield entry.data, data
                else:
                    selector.unregister(stream)


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays a zombie, so that its group keeps its number."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_group(process: Any) -> None:
    """End a process and all that it left in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()
    process.wait()


# --- a board behind ssh or adb

BOARD_SECONDS = 60.0  # for a command of ours on a board; more where much is sent
BOARD_BYTES_PER_SECOND = 200_000  # that a connection carries at least
ENDED = "slm-status"  # the last line of a job's standard error on a board, and its exit status
FACTS = (
    "/proc/cpuinfo /proc/meminfo /proc/device-tree/model /sys/class/thermal/thermal_zone*/temp "
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq "
    "/sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq "
    "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor "
    "/sys/devices/system/cpu/cpu*/cache/index*/size "
    "/sys/devices/system/cpu/cpu*/cache/index*/level "
    "/sys/devices/system/cpu/cpu*/cache/index*/type "
    "/sys/devices/system/cpu/cpu*/cache/index*/shared_cpu_list"
)  # of the files that say what a device is
SENSORS = (
    "/sys/class/thermal/thermal_zone*/temp /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"
)


def is_elsewhere(wrapper: Sequence[str]) -> bool:
    """Whether ``--exec`` leads to another machine, which has none of our files."""
    return bool(wrapper) and os.path.basename(wrapper[0]) in ("ssh", "adb")


class Board:
    """A folder on another machine, that ``ssh BOARD`` or ``adb shell`` leads to.

    All that is needed there is a POSIX shell with cat, chmod, mktemp, mv, readlink and rm.
    """

    def __init__(self, limits: Limits) -> None:
        # The limits are for jobs there, not for ssh.
        self.limits, self.here = limits, Limits(memory_bytes(), 1 << 40, None, limits.wrapper)
        self.sent: dict[str, int] = {}  # name -> which upload of that name
        self.folder = ""

    def shell(
        self,
        script: str,
        stdin: Sequence[bytes | bytearray | memoryview] = (),
        limit: int = 1 << 20,
    ) -> bytearray:
        """What ``script`` writes; JobError where it fails or the board is not to be reached."""
        seconds = BOARD_SECONDS + sum(map(len, stdin)) / BOARD_BYTES_PER_SECOND
        outcome = run_process(
            ["sh -c " + shlex.quote(script)],
            "/",
            self.here,
            stdin,
            time.monotonic() + seconds,
            limit,
        )
        if outcome.status != 0:
            said = outcome.reason or outcome.stderr.decode(errors="replace").strip()[-300:]
            raise JobError(f"the board behind {shlex.join(self.limits.wrapper)!r}: {said}")
        return outcome.stdout

    def path(self, name: str) -> str:
        """Of a file of the session, quoted."""
        if not self.folder:
            made = self.shell(
                'd="${TMPDIR:-/tmp}"; [ -w "$d" ] || d=/data/local/tmp; '
                'mktemp -d "$d/slm-board-XXXXXX"'
            )
            self.folder = made.decode().strip()
        return shlex.quote(f"{self.folder}/{name}")

    def send(self, name: str, path: str, number: int) -> None:
        """Have upload ``number`` of a name there."""
        if self.sent.get(name) == number:
            return
        with open(path, "rb") as file:
            content = file.read()
        there = self.path(name)
        # What a job has put there, a link perhaps, is replaced, never followed.
        self.shell(
            f"rm -rf {there}.part && set -C && cat > {there}.part && chmod 755 {there}.part && "
            f"rm -rf {there} && mv {there}.part {there}",
            [content],
        )
        self.sent[name] = number

    def remove(self, name: str) -> None:
        if self.sent.pop(name, None) is not None:
            self.shell(f"rm -f {self.path(name)}")

    def read(self, name: str, limit: int) -> bytearray:
        """A regular file that a job has left."""
        there = self.path(name)
        return self.shell(f"[ -f {there} ] && [ ! -L {there} ] && exec cat {there}", limit=limit)

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        stdin: Sequence[bytes | bytearray | memoryview],
        deadline: float,
        stdout_limit: int,
    ) -> Outcome:
        """As ``run_process``, there; JobError where the connection is lost."""
        words = [f"./{name}", *arguments]
        if self.limits.cores:
            words = ["taskset", format(sum(1 << core for core in self.limits.cores), "x"), *words]
        memory, disk = self.limits.memory // 1024, self.limits.disk // BLOCK
        script = (
            f"cd {self.path('')} || exit 1; (ulimit -c 0; ulimit -v {memory} && "
            f"ulimit -f {disk} || exit 125; exec {shlex.join(words)}); "
            f's=$?; echo >&2; echo "{ENDED} $s" >&2'
        )
        outcome = run_process(
            ["sh -c " + shlex.quote(script)], "/", self.here, stdin, deadline, stdout_limit
        )
        if outcome.reason:
            self.kill()
            return outcome
        said, _, last = outcome.stderr.rstrip(b"\n").rpartition(b"\n")
        found = re.fullmatch(rb"slm-status (\d{1,3})", last)
        if not found:
            said = outcome.stderr.strip()[-300:]
            raise JobError(f"the connection to the board was lost: {said.decode(errors='replace')}")
        status = int(found.group(1))  # shells have signals so
        return outcome._replace(
            status=128 - status if 128 < status <= 128 + 64 else status, stderr=said.rstrip(b"\n")
        )

    def kill(self) -> None:
        """End what runs in the folder: what has lost its connection may run for ever."""
        folder = shlex.quote(self.folder)
        self.shell(
            f'for p in /proc/[0-9]*; do [ "$(readlink "$p/cwd")" = {folder} ] && '
            'kill -9 "${p#/proc/}"; done 2>/dev/null; true'
        )

    def facts(self, files: str = FACTS) -> Callable[[str], str]:
        """A ``read_text`` of that machine's files, as they are now; of uname as well."""
        mark = "\1\n"
        told = self.shell(
            f'for f in {files}; do [ -r "$f" ] && printf \'\\001\\n%s\\n\' "$f" && '
            "cat \"$f\"; done 2>/dev/null; printf '\\001\\nuname\\n'; uname -m; uname -r"
        ).decode(errors="replace")
        found = dict(part.partition("\n")[::2] for part in told.split(mark)[1:])
        return lambda path: found.get(path, "").strip()

    def close(self) -> None:
        if not self.folder:
            return
        try:
            self.kill()
            self.shell(f"rm -rf {shlex.quote(self.folder)}")
        except JobError as error:
            log(f"{self.folder} is left on the board: {error}")


# ELF's e_machine (System V ABI) by what uname says
MACHINES = {
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    40: "armv7l",
    3: "i686",
    258: "loongarch64",
}


def check_executable(path: str, wrapper: Sequence[str]) -> None:
    """JobError where ``path`` is no ELF program, or one for another machine than this."""
    with open(path, "rb") as file:
        start = file.read(20)
    if len(start) < 20 or start[:4] != b"\x7fELF":
        raise JobError(f"{os.path.basename(path)!r} is not an ELF executable")
    (number,) = struct.unpack("<H", start[18:])
    machine = MACHINES.get(number, f"machine {number}")
    if not wrapper and machine != platform.machine():
        raise JobError(
            f"{os.path.basename(path)!r} was built for {machine}; this device is "
            f"{platform.machine()}: check --target"
        )


# --- what the device is


def read_text(path: str) -> str:
    """Of a file of /proc or /sys; "" where there is none."""
    try:
        with open(path, errors="replace") as file:
            return file.read(1 << 20).strip()
    except OSError:
        return ""


def cores_of(text: str) -> list[int]:
    """The cores of a list such as "4-7,9"; ValueError where it is none."""
    cores: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise ValueError(f"{text!r} is not a list of cores such as 4-7,9")
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return sorted(set(cores))


def temperature(read: Callable[[str], str] = read_text) -> float | None:
    """The hottest sensor, in degrees Celsius."""
    found = []
    for number in range(64):
        text = read(f"/sys/class/thermal/thermal_zone{number}/temp")
        if not text:
            break
        if re.fullmatch(r"-?\d+", text) and -50_000 < int(text) < 200_000:
            found.append(int(text) / 1000)
    return max(found, default=None)


def frequencies(cores: Sequence[int], read: Callable[[str], str] = read_text) -> dict[str, Any]:
    """Of each core, in kHz: {"now", "max"} (null where unknown), and the governors' names."""
    base = "/sys/devices/system/cpu/cpu%d/cpufreq/%s"

    def number(core: int, name: str) -> int | None:
        text = read(base % (core, name))
        return int(text) if text.isdigit() else None

    governors = {read(base % (core, "scaling_governor")) for core in cores} - {""}
    return {
        "now": [number(core, "scaling_cur_freq") for core in cores],
        "max": [number(core, "cpuinfo_max_freq") for core in cores],
        "governors": sorted(governors),
    }


def caches(core: int, read: Callable[[str], str] = read_text) -> list[dict[str, Any]]:
    """[{"level", "type", "bytes", "shared_by"}] of one core."""
    found = []
    for number in range(16):
        folder = f"/sys/devices/system/cpu/cpu{core}/cache/index{number}/"
        size = re.fullmatch(r"(\d+)K", read(folder + "size"))
        if not size:
            break
        found.append({
            "level": int(read(folder + "level") or 0),
            "type": read(folder + "type"),
            "bytes": int(size.group(1)) * 1024,
            "shared_by": read(folder + "shared_cpu_list"),
        })  # fmt: skip
    return found


CPU_NAMES = ("model name", "Hardware", "uarch", "CPU part", "Processor", "cpu model")


def cpu(read: Callable[[str], str] = read_text) -> dict[str, Any]:
    """{"model", "features"} of /proc/cpuinfo, with Linux's names of features."""
    model, features = "", set()
    for line in read("/proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in CPU_NAMES and not model:
            model = value
        elif key in ("flags", "Features"):
            features.update(value.split())
        elif key == "isa":
            features.update(value.lower().replace("rv64", "", 1).split("_")[0])
            features.update(value.lower().split("_")[1:])
    board = read("/proc/device-tree/model").rstrip("\0")
    return {"model": model, "board": board, "features": sorted(features)}


def memory_bytes(read: Callable[[str], str] = read_text) -> int:
    """All of a machine's; 1 GiB where it does not say."""
    found = re.search(r"MemTotal:\s+(\d+) kB", read("/proc/meminfo"))
    return int(found.group(1)) * 1024 if found else 1 << 30


def allowed_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def device_info(settings: argparse.Namespace, board: Board | None) -> dict[str, Any]:
    """What a client compares with its target: of the board, or of the machine in front of an
    emulator."""
    read = board.facts() if board else read_text
    cores = settings.cores or (board_cores(read) if board else allowed_cores())
    here = [platform.machine(), platform.release()]
    machine, system = read("uname").split("\n", 1) if board else here
    return {
        "machine": machine,
        "system": system,
        "exec": settings.exec,
        **cpu(read),
        "cores": cores,
        "caches": caches(cores[0], read),
        "frequency_khz": frequencies(cores, read),
        "memory_bytes": memory_bytes(read),
        "job_memory_bytes": settings.memory,
        "celsius": temperature(read),
        "python": "" if board else platform.python_version(),
    }


def board_cores(read: Callable[[str], str]) -> list[int]:
    """All that a machine's /proc/cpuinfo has."""
    found = re.findall(r"^processor\s*:\s*(\d+)", read("/proc/cpuinfo"), re.MULTILINE)
    return sorted(map(int, found)) or [0]


@contextmanager
def undisturbed() -> Iterator[None]:
    """What asks this process to end waits for the end of this context."""
    late: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, lambda found, _: late.append(found)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    if late:
        os.kill(os.getpid(), late[0])


# --- one client's session

REQUEST, RESULT = b"SLMKREQ1", b"SLMKRES1"


class How(NamedTuple):
    """How a kernel is timed; as TVM's time_evaluator has it."""

    timed: int = 0
    number: int = 1
    repeat: int = 1
    min_repeat_ms: int = 0
    limit_zero_time_iterations: int = 0
    cooldown_interval_ms: int = 0
    repeats_to_cooldown: int = 1
    cache_flush_bytes: int = 0  # -1: flush the buffers, the first one left out


class Session:
    """One client: its files, modules, functions and buffers, all gone with it."""

    def __init__(self, sock: Any, options: dict[str, float], settings: argparse.Namespace) -> None:
        self.sock, self.settings = sock, settings
        seconds = options.get("timeout", 0.0)
        self.deadline: Deadline = time.monotonic() + seconds if seconds else None
        self.folder = tempfile.mkdtemp(prefix=f"slm-runner-{os.getpid()}-", dir=settings.folder)
        self.limits = Limits(
            settings.memory, settings.disk, settings.user, settings.exec, settings.cores
        )
        self.board = Board(self.limits) if is_elsewhere(settings.exec) else None
        if settings.user:
            shutil.chown(self.folder, settings.user)
        self.objects: dict[int, Any] = {}
        self.buffers: dict[int, bytearray] = {}
        self.uploads: dict[str, int] = {}  # name -> bytes
        self.number: dict[str, int] = {}  # name -> which upload of it
        self.next_number = 0x1000
        self.globals: dict[str, Callable[..., Any]] = {
            "tvm.rpc.server.upload": self.upload,
            "tvm.rpc.server.download": self.download,
            "tvm.rpc.server.remove": self.remove,
            "tvm.rpc.server.load_module": self.load_module,
            "tvm.rpc.server.ModuleGetFunction": self.module_function,
            "runtime.RPCTimeEvaluator": self.time_evaluator,
            "tvm.contrib.random.random_fill": self.random_fill,
            "tvm.contrib.random.random_fill_for_measure": self.random_fill,
            "slm.job.run": self.run_job,
            "slm.device.info": lambda: json.dumps(device_info(settings, self.board)),
        }

    # --- the connection

    def send(self, code: int, body: bytes) -> None:
        self.sock.settimeout(IDLE_SECONDS)
        self.sock.sendall(struct.pack("<Qi", len(body) + 4, code) + body)

    def serve(self) -> None:
        """Answer until the client ends the session, its time is over or it sends what is no packet
        (PeerError, OSError)."""
        while True:
            idle = time.monotonic() + IDLE_SECONDS
            deadline = idle if self.deadline is None else min(idle, self.deadline)
            try:
                (size,) = struct.unpack("<Q", receive(self.sock, 8, deadline))
                if size == 0:
                    continue
                if not 4 <= size <= self.settings.memory:
                    raise PeerError(
                        f"a packet of {size:,} bytes; --memory is {self.settings.memory:,}"
                    )
                packet = Reader(receive(self.sock, size, deadline))
            except socket.timeout:
                self.fail("RPCSessionTimeoutError: the time of this session is over")
                return
            code = packet.one("i")
            if code == SHUTDOWN:
                return
            try:
                self.answer(code, packet)
            except JobError as error:
                self.fail(str(error))
            except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError,
                    ValueError, struct.error) as error:  # fmt: skip
                self.fail(f"a call with the wrong arguments: {error!r}")

    def fail(self, message: str) -> None:
        self.send(EXCEPTION, sequence(message))

    def answer(self, code: int, packet: Reader) -> None:
        if code == INIT:
            version, arguments = str(packet.text(), "utf-8"), packet.values()
            if version != VERSION:
                raise JobError(f"the client speaks RPC {version!r}, this runner {VERSION!r}")
            if arguments:
                raise JobError("this runner has no session constructors")
            self.send(RETURN, sequence(None))
        elif code == CALL:
            number = packet.one("Q")
            function = self.objects.get(number)
            if not callable(function):
                raise JobError(f"there is no function {number:#x}")
            values = packet.values()
            try:
                result = function(*values)
            except OSError as error:  # of files and processes: the connection is not used here
                raise JobError(f"on the device: {error.strerror or error}") from error
            self.send(RETURN, returned(result))
        elif code == COPY_TO:
            tensor, count = packet.tensor(), packet.one("Q")
            self.slice(tensor, count)[:] = packet.take(count)
            self.send(RETURN, sequence(None))
        elif code == COPY_FROM:
            tensor, count = packet.tensor(), packet.one("Q")
            self.send(COPY_ACK, bytes(self.slice(tensor, count)))
        else:  # a system call: exactly one value comes back
            self.send(RETURN, sequence(self.syscall(code, packet.values())))

    def syscall(self, code: int, values: list[Any]) -> Any:
        if code == GET_GLOBAL:
            function = self.globals.get(values[0])
            return Pointer(self.keep(function) if function else 0)
        if code == FREE_HANDLE:
            self.objects.pop(values[0], None)
        elif code == ALLOC:
            return self.allocate(values[1])
        elif code == ALLOC_SCOPED:
            return self.allocate(values[0].nbytes)
        elif code == FREE:
            self.buffers.pop(values[1], None)
        elif code == COPY_AMONG:
            source, target = values[:2]
            self.slice(target, target.nbytes)[:] = self.slice(source, source.nbytes)
        elif code == GET_ATTR:
            return int(tuple(values[0]) == (CPU, 0))  # of all attributes clients ask for kExist
        elif code in (NEW_STREAM, GET_STREAM):
            return Pointer(0)
        elif code not in (SYNC, SET_DEVICE, FREE_STREAM, SET_STREAM):
            raise PeerError(f"unknown RPC code {code}")
        return None

    def keep(self, value: Any) -> int:
        if len(self.objects) >= MOST_OBJECTS:
            raise JobError(f"a session may hold {MOST_OBJECTS:,} functions and modules")
        self.next_number += 0x1000
        self.objects[self.next_number] = value
        return self.next_number

    # --- buffers

    def allocate(self, count: int) -> Pointer:
        taken = sum(map(len, self.buffers.values()))
        if not 0 <= count <= self.settings.memory - taken:
            raise JobError(
                f"a buffer of {count:,} bytes beside {taken:,}; a session may have "
                f"{self.settings.memory:,} (--memory of the runner)"
            )
        self.next_number += 0x1000
        self.buffers[self.next_number] = bytearray(count)
        return Pointer(self.next_number)

    def slice(self, tensor: Tensor, count: int) -> memoryview:
        data = self.buffers.get(tensor.data)
        if data is None:
            raise JobError(f"there is no buffer {tensor.data:#x}")
        if tensor.offset + count > len(data):
            raise JobError(f"{count:,} bytes at {tensor.offset:,} of a buffer of {len(data):,}")
        return memoryview(data)[tensor.offset : tensor.offset + count]

    def random_fill(self, tensor: Tensor) -> None:
        """Random values; floats are finite, those of 16 bits and more in [1, 2)."""
        data = bytearray(os.urandom(tensor.nbytes))
        if tensor.code == BOOLEAN or tensor.bits == 1:
            data = bytearray(byte & 1 for byte in data)
        elif tensor.code == BFLOAT or (tensor.code == FLOATING and tensor.bits >= 16):
            step = tensor.bits // 8
            exponent_bits = {64: 11, 32: 8, 16: 8 if tensor.code == BFLOAT else 5}[tensor.bits]
            one = ((1 << (exponent_bits - 1)) - 1) << (15 - exponent_bits)  # the upper 16 bits of 1
            keep = (1 << (15 - exponent_bits)) - 1
            data[step - 1 :: step] = bytes([one >> 8]) * (len(data) // step)
            table = bytes((b & keep & 255) | (one & 255) for b in range(256))
            if keep > 255:  # float16: two bits of the fraction are in the upper byte
                top = bytearray(os.urandom(len(data) // step))
                data[step - 1 :: step] = top.translate(bytes(one >> 8 | b & 3 for b in range(256)))
            else:
                data[step - 2 :: step] = data[step - 2 :: step].translate(table)
        elif tensor.code not in (SIGNED, UNSIGNED):  # float8 and smaller: no infinity, no NaN
            data = data.translate(bytes(b & 0x33 for b in range(256)))
        self.slice(tensor, len(data))[:] = data

    # --- files

    def path(self, name: Any) -> str:
        """Of a file of this session; a name has no folders."""
        if not isinstance(name, str) or not re.fullmatch(
            r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}", name
        ):
            raise JobError(
                f"{str(name)[:80]!r} is no name for a file of a session: letters, digits and "
                "_.+=@-, without a folder"
            )
        return os.path.join(self.folder, name)

    def upload(self, name: str, data: memoryview) -> None:
        path = self.path(name)
        others = sum(size for other, size in self.uploads.items() if other != name)
        if others + len(data) > self.settings.disk:
            raise JobError(f"uploads beyond {self.settings.disk:,} bytes (--disk of the runner)")
        # What a job has put there, a link perhaps, is replaced, never followed.
        if os.path.lexists(path):
            os.unlink(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o755)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(path, 0o755)
        self.uploads[name] = len(data)
        self.number[name] = self.number.get(name, 0) + 1

    def download(self, name: str) -> bytes:
        if self.board and name not in self.uploads:
            self.path(name)
            return bytes(self.board.read(name, self.settings.memory))
        descriptor = os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise JobError(f"{name!r} is not a file")
            content = file.read(self.settings.memory + 1)
        if len(content) > self.settings.memory:
            raise JobError(f"{name!r} is larger than {self.settings.memory:,} bytes")
        return content

    def remove(self, name: str) -> None:
        # MetaSchedule removes x, x.so and "" (the folder), whether they are there or not.
        if not name:
            return
        path = self.path(name)
        if os.path.lexists(path) and not os.path.isdir(path):
            os.unlink(path)
        self.uploads.pop(name, None)
        if self.board:
            self.board.remove(name)

    def too_much_on_disk(self) -> str:
        """Why a job has to end, or ""."""
        total = 0
        for base, _folders, names in os.walk(self.folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(base, name)).st_blocks * BLOCK
                except OSError:
                    continue
        return (
            f"it wrote more than {self.settings.disk:,} bytes" if total > self.limits.disk else ""
        )

    def sweep(self) -> None:
        """Remove what jobs have left beside the uploads where that is too much."""
        if not self.too_much_on_disk():
            return
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name in self.uploads:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)

    # --- jobs

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        stdin: Sequence[bytes | bytearray | memoryview],
        seconds: float,
        stdout_limit: int,
    ) -> Outcome:
        """Run the uploaded executable ``name`` for ``seconds`` at most."""
        path = self.path(name)
        if not os.path.isfile(path) or os.path.islink(path):
            raise JobError(f"no file {name!r} was uploaded")
        check_executable(path, self.limits.wrapper)
        if self.board:
            for file in self.uploads:
                self.board.send(file, os.path.join(self.folder, file), self.number[file])
        deadline = time.monotonic() + min(seconds, self.settings.timeout)
        if self.deadline is not None:  # what remains is for the answer
            deadline = min(deadline, max(self.deadline - 0.5, time.monotonic() + 0.1))
        if self.board:
            return self.board.run(name, arguments, stdin, deadline, stdout_limit)
        try:
            return run_process(
                [path, *arguments], self.folder, self.limits, stdin, deadline, stdout_limit,
                self.too_much_on_disk,
            )  # fmt: skip
        finally:
            self.sweep()

    def sensors(self) -> Callable[[str], str]:
        """A ``read_text`` of the device's temperatures and frequencies."""
        return self.board.facts(SENSORS) if self.board else read_text

    def clocks(self, read: Callable[[str], str]) -> list[int | None]:
        """Of the cores that jobs run on, in kHz."""
        if not self.board:
            return list(frequencies(allowed_cores(), read)["now"])
        found = self.settings.cores or range(64)
        now = frequencies(found, read)["now"]
        return [khz for khz in now if khz is not None]

    def cool_down(self) -> bool:
        """Wait until the device is no hotter than ``--max-celsius``; False where it stays so."""
        most = self.settings.max_celsius
        until = time.monotonic() + REST_SECONDS
        while most is not None:
            now = temperature(self.sensors())
            if now is None or now <= most:
                break
            if time.monotonic() > until:
                return False
            time.sleep(1)
        return True

    def run_job(
        self, name: str, arguments: str, stdin: memoryview, seconds: float, stdout_limit: int
    ) -> bytes:
        """``slm.job.run``: arguments is a JSON list of strings. Returns a JSON object after its
        length as uint32, then the standard output."""
        words = json.loads(arguments)
        if not isinstance(words, list) or not all(
            isinstance(w, str) and "\0" not in w for w in words
        ):
            raise JobError("the arguments are not a list of strings")
        if not (0 < float(seconds) < math.inf and 0 <= stdout_limit <= LARGEST_OUTPUT):
            raise JobError(f"limits of {seconds} s and {stdout_limit} bytes")
        cool, before = self.cool_down(), self.clocks(self.sensors())
        outcome = self.run(name, words, [stdin], float(seconds), stdout_limit)
        after = self.sensors()
        told = {
            "status": outcome.status,
            "killed": outcome.reason,
            "seconds": outcome.seconds,
            "stderr": outcome.stderr.decode(errors="replace"),
            "hot": not cool,
            "celsius": temperature(after),
            "khz_before": before,
            "khz_after": self.clocks(after),
        }
        head = json.dumps(told).encode()
        return struct.pack("<I", len(head)) + head + bytes(outcome.stdout)

    # --- kernels

    def load_module(self, name: str) -> Handle:
        path = self.path(name)
        if not os.path.isfile(path) or os.path.islink(path):
            raise JobError(f"no file {name!r} was uploaded")
        check_executable(path, self.limits.wrapper)
        return Handle(MODULE, self.keep(("module", name)))

    def module_name(self, module: Handle) -> str:
        found = self.objects.get(module.number)
        if not isinstance(found, tuple) or found[0] != "module":
            raise JobError("there is no such module")
        return str(found[1])

    def module_function(self, module: Handle, name: str, _imports: Any) -> Handle:
        file = self.module_name(module)
        return Handle(FUNCTION, self.keep(lambda *values: self.call(file, name, How(), values)))

    def time_evaluator(
        self, module: Handle, name: str, kind: int, _index: int, number: int, repeat: int,
        min_repeat_ms: int, limit_zero: int, cooldown_ms: int, cooldown_every: int,
        flush_bytes: int, preprocess: str,
    ) -> Handle:  # fmt: skip
        file = self.module_name(module)
        if kind != CPU:
            raise JobError(f"no device of type {kind}: this runner has a CPU")
        if preprocess not in ("", "cache_flush_cpu_non_first_arg"):
            raise JobError(f"unknown f_preproc {preprocess!r}")
        if number < 1 or repeat < 1 or cooldown_every < 1 or not 0 <= flush_bytes <= 1 << 30:
            raise JobError("number, repeat and repeats_to_cooldown are at least 1, "
                           "cache_flush_bytes at most 1 GiB")  # fmt: skip
        how = How(1, number, repeat, min_repeat_ms, limit_zero, cooldown_ms, cooldown_every,
                  -1 if preprocess else flush_bytes)  # fmt: skip

        def evaluate(*values: Any) -> bytes:
            self.cool_down()
            seconds = self.call(file, name, how, values)
            return struct.pack(f"<{repeat}d", *seconds)

        return Handle(FUNCTION, self.keep(evaluate))

    def call(self, file: str, name: str, how: How, values: Sequence[Any]) -> Any:
        """Run a kernel: tensors, then integers. A name "kernel@4" is run on 4 threads.

        Buffers take what the kernel wrote only where it came to its end. -> seconds of each repeat,
        None where it is not timed.
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        scalars = list(values[len(tensors) :])
        if not all(isinstance(s, int) and not isinstance(s, (bool, Pointer)) for s in scalars):
            raise JobError("a kernel takes tensors first, then integers, and nothing else")
        symbol, _, threads = name.partition("@")
        if threads and not re.fullmatch(r"[1-9]\d{0,2}", threads):
            raise JobError(f"{threads!r} is no number of threads")
        views = [self.slice(tensor, tensor.nbytes) for tensor in tensors]
        head = REQUEST + struct.pack(
            "<IiiqiiiiiqII", len(symbol), int(threads or 1), how.timed, how.number, how.repeat,
            how.min_repeat_ms, how.limit_zero_time_iterations, how.cooldown_interval_ms,
            how.repeats_to_cooldown, how.cache_flush_bytes, len(views), len(scalars),
        )  # fmt: skip
        head += symbol.encode() + struct.pack(f"<{len(scalars)}q", *scalars)
        head += struct.pack(f"<{len(views)}Q", *map(len, views))
        most = 16 + 8 * how.repeat + sum(8 + len(view) for view in views)
        outcome = self.run(file, ["kernel"], [head, *views], self.settings.timeout, most)
        check_outcome(name, outcome)
        return self.take_result(name, outcome.stdout, how, views)

    def take_result(self, name: str, data: bytearray, how: How, views: list[memoryview]) -> Any:
        if data[:8] != RESULT:
            raise JobError(f"{name} did not answer; it is not built by slmtvm.rpc.program")
        reader = Reader(data)
        reader.take(8)
        try:
            count, buffers = reader.unpack("II")
            if (count, buffers) != (how.repeat * how.timed, len(views)):
                raise PeerError("other counts than asked for")
            seconds = reader.unpack(f"{count}d")
            sizes = reader.unpack(f"{buffers}Q")
            written = [reader.take(size) for size in sizes]
        except PeerError as error:
            raise JobError(f"{name} gave half an answer: {error}") from error
        for number, content in enumerate(written):
            if len(content):
                views[number][: len(content)] = content
        return seconds if how.timed else None

    def close(self) -> None:
        with undisturbed():
            if self.board:
                self.board.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.sock.close()


def check_outcome(name: str, outcome: Outcome) -> None:
    """JobError, in words, where a process did not end well."""
    if outcome.reason == "time":
        raise JobError(f"{name} was killed after {outcome.seconds:.1f} s")
    if outcome.reason:
        raise JobError(f"{name} was killed: {outcome.reason}")
    assert outcome.status is not None
    said = outcome.stderr.decode(errors="replace").strip()[-500:]
    if outcome.status < 0:
        number = -outcome.status
        names = {s.value: s.name for s in signal.Signals}
        raise JobError(f"{name} was ended by {names.get(number, number)}{': ' * bool(said)}{said}")
    if outcome.status:
        raise JobError(f"{name} failed with status {outcome.status}{': ' * bool(said)}{said}")


# --- who may come in


class Door:
    """Listens; lets in who has the key that is expected, everybody else is turned away at once.

    Without a tracker that is the device's key, and clients wait for their turn. Of an offer to a
    tracker it is one client's.

    Handshakes are done by threads, so that a peer that says nothing holds nobody up.
    """

    def __init__(
        self, listener: socket.socket, key: str, tls: str | None, expected: str | None
    ) -> None:
        self.listener, self.key = listener, key
        self.standing = expected is not None  # the key of all clients, who queue up
        self.tls = tls_context(tls, server=True) if tls else None
        self.lock = threading.Lock()
        self.expected = expected
        self.admitted: queue.Queue[tuple[Any, dict[str, float]]] = queue.Queue(MOST_HANDSHAKES)
        self.free = threading.Semaphore(MOST_HANDSHAKES)
        threading.Thread(target=self.listen, daemon=True).start()

    def expect(self, key: str | None) -> None:
        with self.lock:
            self.expected = key

    def listen(self) -> None:
        while True:
            try:
                sock, peer = self.listener.accept()
            except OSError as error:
                if self.listener.fileno() < 0:
                    return
                log(f"cannot accept: {error}")  # no more descriptors, perhaps for a moment
                time.sleep(0.1)
                continue
            if not self.free.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self.greet, args=(sock, peer), daemon=True).start()

    def greet(self, sock: socket.socket, peer: Any) -> None:
        known: Any = sock
        try:
            sock.settimeout(HANDSHAKE_SECONDS)
            if self.tls:
                known = self.tls.wrap_socket(sock, server_side=True)
                if "tuner" not in roles(known):
                    raise PeerError(f"its certificate is for {roles(known)}, not for a tuner")
            options = self.hear(known)
            keep_alive(known)
            self.admitted.put_nowait((known, options))
        except queue.Full:
            log(f"turned away {peer[0]}:{peer[1]}: too many clients wait")
            known.close()
        except (OSError, PeerError, ValueError) as error:
            log(f"refused {peer[0]}:{peer[1]}: {error}")
            known.close()
            sock.close()
        finally:
            self.free.release()

    def hear(self, sock: Any) -> dict[str, float]:
        deadline = time.monotonic() + HANDSHAKE_SECONDS
        magic, size = struct.unpack("<ii", receive(sock, 8, deadline))
        if magic != MAGIC or not 0 < size <= LARGEST_GREETING:
            raise PeerError("it is not a TVM client")
        words = receive(sock, size, deadline).decode().split()
        options = {}
        for word in words[1:]:
            if word.startswith("-timeout="):
                seconds = float(word[len("-timeout=") :])
                if not 0 <= seconds < math.inf:
                    raise PeerError(f"a session of {seconds} s")
                options["timeout"] = seconds
        with self.lock:
            wanted = self.expected
            right = wanted is not None and bool(words) and secrets.compare_digest(
                words[0].encode(), f"client:{wanted}".encode()
            )  # fmt: skip
            if right and not self.standing:
                self.expected = None  # one client for each offer
        if not right:
            sock.sendall(struct.pack("<i", MISMATCH))
            raise PeerError("its key is not the one that was offered")
        answer = ("server:" + self.key).encode()
        sock.sendall(struct.pack("<ii", MAGIC, len(answer)) + answer)
        return options


# --- registering, serving


def parse_address(text: str, default_port: int) -> tuple[str, int]:
    """ "host:port", "host" or "[v6]:port"."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\]]+)(?::(\d{1,5}))?", text)
    if not found or int(found.group(2) or 0) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as host:{default_port}")
    return found.group(1).strip("[]"), int(found.group(2) or default_port)


def tracker_address(text: str) -> tuple[str, int]:
    return parse_address(text, 9190)


def size(text: str) -> int:
    """A number of bytes: 512M, 2G."""
    found = re.fullmatch(r"(\d+)([KMGT]?)", text)
    if not found or not int(found.group(1)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M")
    return int(found.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)]


def device_key(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a key: letters, digits and _.+-")
    return text


class Registration:
    """Our entry in a tracker."""

    def __init__(self, settings: argparse.Namespace, port: int) -> None:
        self.key, self.match = settings.key, ""
        self.host: str | None = settings.advertise[0] if settings.advertise else None
        self.port: int = settings.advertise[1] if settings.advertise else port
        self.link = TrackerLink(settings.tracker, settings.tls)
        self.link.ask([UPDATE_INFO, {"key": "server:" + self.key, "addr": [self.host, self.port]}])

    def offer(self, door: Door) -> None:
        """Put ourselves up for the next client, whom the tracker may know already."""
        self.match = f"{self.key}:{secrets.token_hex(16)}"
        door.expect(self.match)
        if self.link.ask([PUT, self.key, [self.port, self.match], self.host]) != SUCCESS:
            raise PeerError("the tracker refused this device")

    def stands(self) -> bool:
        return self.match in self.link.ask([PENDING_KEYS])


def next_client(door: Door, registration: Registration | None) -> tuple[Any, dict[str, float]]:
    """Wait for the next client's connection and options."""
    if registration is None:
        return door.admitted.get()
    registration.offer(door)
    unclaimed = 0
    while True:
        try:
            return door.admitted.get(timeout=POLL_SECONDS)
        except queue.Empty:
            unclaimed = 0 if registration.stands() else unclaimed + 1
        if unclaimed >= UNCLAIMED_POLLS:  # who was given our offer never came
            registration.offer(door)
            unclaimed = 0


def serve_session(sock: Any, options: dict[str, float], settings: argparse.Namespace) -> None:
    session = Session(sock, options, settings)
    start = time.monotonic()
    try:
        session.serve()
        log(f"a session of {time.monotonic() - start:.1f} s ended")
    except (OSError, PeerError) as error:
        log(f"a session ended after {time.monotonic() - start:.1f} s: {error}")
    finally:
        session.close()


def remove_leftovers(folder: str) -> None:
    """Folders of runners that were ended without a chance to clean up."""
    for name in os.listdir(folder):
        found = re.fullmatch(r"slm-runner-(\d+)-\w+", name)
        if found and not os.path.exists(f"/proc/{found.group(1)}"):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def follow_standard_input() -> None:
    """End when whoever holds the other end of our standard input does."""
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def serve(settings: argparse.Namespace) -> int:
    """Serve one client after the other, for ever.

    OSError where the port cannot be had, SetupError where an option asks for what is not there.
    """
    if settings.cores and not is_elsewhere(settings.exec):
        os.sched_setaffinity(0, settings.cores)
    if settings.user and is_elsewhere(settings.exec):
        raise SetupError("--user is for jobs on this machine; --exec says who is on the board")
    if settings.user and (os.geteuid() != 0 or sys.version_info < (3, 9)):
        raise SetupError("--user needs a runner that is root, and Python 3.9")
    if settings.user:
        try:
            pwd.getpwnam(settings.user)
        except KeyError:
            raise SetupError(f"--user: there is no user {settings.user!r}") from None
    settings.folder = settings.folder or tempfile.gettempdir()
    remove_leftovers(settings.folder)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.port), family=family, backlog=64)
    port = listener.getsockname()[1]
    door = Door(listener, settings.key, settings.tls, None if settings.tracker else settings.key)
    if settings.leash:
        print(port, flush=True)
        threading.Thread(target=follow_standard_input, daemon=True).start()
    log(f"{settings.key}: listening on {settings.host}:{port}{' with TLS' if settings.tls else ''}")
    registration: Registration | None = None
    known = True
    try:
        while True:
            try:
                if settings.tracker and registration is None:
                    registration = Registration(settings, port)
                    log(f"registered with {settings.tracker[0]}:{settings.tracker[1]}")
                    known = True
                sock, options = next_client(door, registration)
            except (OSError, PeerError) as error:
                door.expect(None)
                if known:  # said once, tried until it is there
                    log(f"no tracker at {settings.tracker}: {error}; trying again")
                if registration:
                    registration.link.close()
                registration, known = None, False
                time.sleep(settings.retry)
                continue
            serve_session(sock, options, settings)
    finally:
        listener.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the runner."""

    def cores(text: str) -> list[int]:
        try:
            return cores_of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    add = parser.add_argument
    add(
        "--tracker",
        type=tracker_address,
        metavar="HOST:PORT",
        help="the tracker to register with (default: none, clients know the port)",
    )
    add("--key", type=device_key, default="device", help="what clients ask the tracker for")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1; 0.0.0.0 lets other machines in)",
    )
    add("--port", type=int, default=0, help="port to listen on (default: any free one)")
    add(
        "--advertise",
        type=lambda t: parse_address(t, 0),
        metavar="HOST:PORT",
        help="where clients reach this runner (default: as the tracker sees it)",
    )
    add("--tls", metavar="DIR", help="keys for mutual TLS: ca.pem, cert.pem and key.pem")
    add(
        "--exec",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help='what jobs are started through, such as "qemu-riscv64-static -cpu rv64,v=true"; '
        '"ssh BOARD" and "adb shell" run them on another machine',
    )
    add("--cores", type=cores, metavar="LIST", help="cores that jobs may use, such as 4-7")
    add(
        "--memory",
        type=size,
        default=memory_bytes() // 2,
        metavar="SIZE",
        help="most memory of a job, and of a session's buffers (default: half of all)",
    )
    add(
        "--disk",
        type=size,
        default=1 << 30,
        metavar="SIZE",
        help="most room for a session's files (default 1G)",
    )
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="most time for one job (default 600)",
    )
    add(
        "--max-celsius",
        type=float,
        metavar="DEGREES",
        help="wait before a job until the device is no hotter",
    )
    add("--user", help="whom jobs run as, where the runner is root")
    add("--folder", metavar="DIR", help="where sessions keep their files (default: /tmp)")
    add("--retry", type=float, default=2.0, help=argparse.SUPPRESS)
    # Print the port, and end when standard input does: for the program that started this one.
    add("--leash", action="store_true", help=argparse.SUPPRESS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="slm_runner.py", description="Measure for slmtvm.")
    add_arguments(parser)

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    settings = parser.parse_args(arguments)
    try:
        return serve(settings)
    except KeyboardInterrupt:
        return 130
    except (OSError, SetupError) as error:
        print(f"slm_runner.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
