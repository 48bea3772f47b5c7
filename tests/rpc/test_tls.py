"""With keys, nobody without a certificate of the farm, and of the right role, is heard."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.errors import RpcError
from slmtvm.rpc.client import devices, registered
from slmtvm.rpc.keygen import keygen
from slmtvm.rpc.slm_runner import MAGIC, PeerError, TrackerLink, receive, tls_context
from tests.rpc.processes import Process, Runner, Tracker, running, wait_until_registered


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keygen(folder, ["board-1"])
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of another farm."""
    folder = tmp_path_factory.mktemp("others")
    keygen(folder)
    return folder


@pytest.fixture(scope="module")
def farm(keys: Path) -> Iterator[tuple[Tracker, Runner]]:
    tracker = Tracker(0, "--tls", str(keys))
    options = ("--key", "safe", "--tls", str(keys / "board-1"))
    runner = Runner("--tracker", tracker.address, *options)
    with running(tracker, runner):
        wait_until_registered(tracker, "safe", 1, keys)
        yield tracker, runner


def greeting(port: int, context: ssl.SSLContext, role: str) -> bytes:
    """What comes back when a client greets the runner; b"" where the connection was cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=role) as sock:
                sock.sendall(struct.pack("<ii", MAGIC, 8) + b"client:x")
                return bytes(receive(sock, 4))
        except (OSError, PeerError):
            return b""


def test_a_job_runs_over_tls_with_tvms_own_client(
    farm: tuple[Tracker, Runner], keys: Path, job: bytes
) -> None:
    tracker, _ = farm
    data = bytes(range(256)) * 20_000
    for _ in range(2):
        with next(devices(tracker.address, "safe", tls=keys, wait_s=30)) as device:
            assert device.run(job, ["cat"], stdin=data).stdout == data


@pytest.mark.slow
def test_programs_that_speak_no_tls_go_through_a_relay(
    farm: tuple[Tracker, Runner], keys: Path
) -> None:
    from tvm import rpc

    tracker, _ = farm
    relay = Process(
        [sys.executable, "-m", "slmtvm.cli", "rpc", "relay", "--tracker", tracker.address,
         "--tls", str(keys), "--port", "0"]
    )  # fmt: skip
    with running(relay):
        port = int(relay.wait_for(r"relay on 127\.0\.0\.1:(\d+)").group(1))
        client = rpc.connect_tracker("127.0.0.1", port)
        for _ in range(2):
            remote = client.request("safe", session_timeout=20)
            assert remote.cpu().exist
            del remote
        client.close()


def test_the_runner_hears_a_tuner_and_nobody_else(
    farm: tuple[Tracker, Runner], keys: Path, others: Path
) -> None:
    _, runner = farm
    tuner = tls_context(str(keys / "tuner"), server=False)
    assert greeting(runner.port, tuner, "runner") == struct.pack("<i", MAGIC + 2)  # a wrong key
    runner.wait_for("refused .*: its key is not the one that was offered")

    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.load_verify_locations(keys / "ca.pem")
    assert greeting(runner.port, nobody, "runner") == b""
    runner.wait_for("refused .*PEER_DID_NOT_RETURN_A_CERTIFICATE")

    stolen = tls_context(str(keys / "runner"), server=False)
    assert greeting(runner.port, stolen, "runner") == b""
    runner.wait_for(r"refused .*certificate is for \['runner'\], not for a tuner")

    foreign = tls_context(str(others / "tuner"), server=False)
    foreign.load_verify_locations(keys / "ca.pem")  # it trusts the runner; the runner not it
    assert greeting(runner.port, foreign, "runner") == b""
    runner.wait_for("refused .*(UNKNOWN_CA|CERTIFICATE_VERIFY_FAILED)")

    old = tls_context(str(keys / "tuner"), server=False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert greeting(runner.port, old, "runner") == b""
    runner.wait_for("refused .*(UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION|unsupported)")


def test_the_tracker_hears_tuners_and_runners_of_its_farm_each_for_its_own(
    farm: tuple[Tracker, Runner], keys: Path, others: Path
) -> None:
    tracker, _ = farm
    with pytest.raises(RpcError, match="cannot be reached"):
        registered(tracker.address, tls=others)
    link = TrackerLink(("127.0.0.1", tracker.port), str(keys / "tuner"))
    with pytest.raises((PeerError, OSError)):
        link.ask([3, "safe", [1, "safe:1"], None])  # a tuner that says it is a device
    link.close()
    link = TrackerLink(("127.0.0.1", tracker.port), str(keys / "runner"))
    with pytest.raises((PeerError, OSError)):
        link.ask([4, "safe", "", 1])  # a board that wants to run code on others
    link.close()
    assert registered(tracker.address, tls=keys).count("safe") == 1


@pytest.mark.slow
def test_a_tuner_does_not_talk_to_a_tracker_of_another_farm(others: Path, keys: Path) -> None:
    with (
        running(tracker := Tracker(0, "--tls", str(others))),
        pytest.raises(RpcError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        registered(tracker.address, tls=keys)


def test_a_recorded_handshake_is_worth_nothing(
    farm: tuple[Tracker, Runner], keys: Path, job: bytes
) -> None:
    """All that a tuner sent in a session, sent again; and cut off at several places."""
    tracker, runner = farm
    context = tls_context(str(keys / "tuner"), server=False)
    recorded = bytearray()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="runner")
    with socket.create_connection(("127.0.0.1", runner.port), timeout=10) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                recorded += (data := outgoing.read())
                sock.sendall(data)
                incoming.write(sock.recv(1 << 16))
        tls.write(struct.pack("<ii", MAGIC, 8) + b"client:x")
        recorded += (data := outgoing.read())
        sock.sendall(data)
        assert sock.recv(1 << 16)
    for length in (1, 5, 100, len(recorded) // 2, len(recorded) - 1, len(recorded)):
        with socket.create_connection(("127.0.0.1", runner.port), timeout=10) as sock:
            answer = bytearray()
            with contextlib.suppress(ConnectionError):  # the runner may cut it off at any byte
                sock.sendall(recorded[:length])
                with contextlib.suppress(OSError):  # and so be gone already
                    sock.shutdown(socket.SHUT_WR)
                while data := sock.recv(1 << 16):
                    answer += data
            assert struct.pack("<i", MAGIC + 2) not in answer
    with next(devices(tracker.address, "safe", tls=keys, wait_s=30)) as device:
        assert device.run(job).ok


@pytest.mark.slow
def test_keys_are_for_their_owner_alone_and_stay_when_more_are_made(tmp_path: Path) -> None:
    first = keygen(tmp_path)
    assert {path.name for path in first} == {"tuner", "tracker", "runner"}
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    assert [path.name for path in keygen(tmp_path, ["board-2"])] == ["board-2"]
    assert all(path.read_bytes() == content for path, content in before.items())
    for secret in tmp_path.rglob("*.key"), tmp_path.rglob("key.pem"):
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in secret)
    for bad in ("tuner", "a/b", ""):
        with pytest.raises(RpcError, match="is no name for a runner"):
            keygen(tmp_path, [bad])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here: apt install openssl")
def test_openssl_takes_the_certificates_for_what_they_are(keys: Path) -> None:
    for purpose in ("sslclient", "sslserver"):
        for name in ("tuner", "tracker", "runner", "board-1"):
            result = subprocess.run(
                ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile",
                 keys / "ca.pem", keys / name / "cert.pem"], capture_output=True, text=True,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
    text = subprocess.run(
        ["openssl", "x509", "-in", keys / "board-1" / "cert.pem", "-noout", "-text"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "DNS:runner, DNS:board-1" in text
