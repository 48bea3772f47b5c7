"""Random bytes at every port, with TLS and without: nothing runs or dies, a line is logged."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.rpc.client import devices
from slmtvm.rpc.keygen import keygen
from slmtvm.rpc.slm_runner import MAGIC, TRACKER_MAGIC
from tests.rpc.processes import Process, Runner, Tracker, running, wait_until_registered

FEW, MANY = 150, 10_000


@pytest.fixture(params=[False, True], ids=["plain", "tls"], scope="module")
def farm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tracker, Runner, Path | None]]:
    keys, tls = tmp_path_factory.mktemp("keys"), request.param
    options: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if tls:
        keygen(keys)
        options = ("--tls", str(keys)), ("--tls", str(keys / "runner"))
    tracker = Tracker(0, *options[0])
    runner = Runner("--tracker", tracker.address, "--key", "prey", *options[1])
    with running(tracker, runner):
        wait_until_registered(tracker, "prey", 1, keys if tls else None)
        yield tracker, runner, keys if tls else None


def streams(seed: int, count: int) -> Iterator[bytes]:
    """Noise, and noise after what each protocol begins with."""
    rng = random.Random(seed)
    for i in range(count):
        noise = rng.randbytes(rng.choice((0, 1, 3, 4, 7, 8, 60, 1000)))
        text = b"client:prey:" + noise[:8].hex().encode()
        yield (
            noise,
            struct.pack("<ii", MAGIC, len(text)) + text,
            struct.pack("<ii", MAGIC, rng.choice((-1, 0, 8, 1 << 30))) + noise,
            struct.pack("<ii", TRACKER_MAGIC, rng.choice((-1, 0, len(noise), 1 << 30))) + noise,
            struct.pack("<i", TRACKER_MAGIC) + frame(b'[3, "prey", [1, "prey:x"], null]x'),
            struct.pack("<i", TRACKER_MAGIC) + frame(b'[2, "stop"]') + noise,
            b"\x16\x03\x01" + struct.pack(">H", len(noise)) + noise,
            b"GET / HTTP/1.1\r\n\r\n",
        )[i % 8]


def frame(message: bytes) -> bytes:
    return struct.pack("<i", len(message)) + message


def send(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1000):
                pass
        except OSError:  # it was cut off already
            pass


@pytest.mark.slow
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("who", ["tracker", "runner"])
def test_random_bytes_do_nothing_and_are_logged(
    who: str, count: int, farm: tuple[Tracker, Runner, Path | None], job: bytes
) -> None:
    tracker, runner, tls = farm
    victim: Process = tracker if who == "tracker" else runner
    port = tracker.port if who == "tracker" else runner.port
    before = len(victim.lines)
    for data in streams(count, count):
        send(port, data)
    assert tracker.alive and runner.alive
    with next(devices(tracker.address, "prey", tls=tls, wait_s=60)) as device:
        assert device.run(job, ["well"]).stdout == b"well\n"
    said = victim.lines[before:]
    refused = [line for line in said if "refused" in line]
    assert "Traceback" not in "".join(said)
    assert count / 2 < len(refused) <= count
    assert runner.descriptors() < 30


@pytest.mark.slow
def test_random_packets_within_a_session_end_at_most_the_session(
    tracker: Tracker, runner: Runner
) -> None:
    """A client with the right key, which then sends packets of noise."""
    from tvm import rpc

    from slmtvm.rpc.client import _ask

    rng = random.Random(0)
    for _ in range(60):
        _, (host, port, match) = _ask(tracker.address, None, [4, "test", "", 1], timeout=30)
        greeting = f"client:{match} -timeout=5".encode()
        with socket.create_connection((host, port), timeout=10) as sock:
            sock.sendall(struct.pack("<ii", MAGIC, len(greeting)) + greeting)
            assert struct.unpack("<i", sock.recv(4))[0] == MAGIC
            for _ in range(20):
                body = rng.randbytes(rng.choice((4, 12, 40, 200)))
                code = struct.pack("<i", rng.randrange(2, 22))
                count = struct.pack("<i", rng.choice((1, 2, 3, -1, 1 << 30)))
                kind = struct.pack("<i", rng.choice((0, 1, 3, 4, 7, 8, 11, 65, 68, 73)))
                packet = code + rng.choice((body, count + kind + body, body[:8] + count + kind))
                try:
                    sock.sendall(struct.pack("<Q", len(packet)) + packet)
                except ConnectionError:
                    break
    assert runner.alive
    remote = rpc.connect_tracker("127.0.0.1", tracker.port).request("test", session_timeout=10)
    assert remote.cpu().exist
    assert "Traceback" not in "".join(runner.lines)
