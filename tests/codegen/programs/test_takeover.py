"""slm-serve goes on as another version at SIGHUP, and no request is lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmtvm.audit import verify_log
from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import generate_keys, key_signer
from slmtvm.runtime import load
from slmtvm.runtime.serving import server_program
from slmtvm.runtime.text import generate_text
from tests.codegen.programs.serving import Server, serving
from tests.end_to_end.bundles import bundle_for
from tests.models import PROMPTS

pytestmark = pytest.mark.slow
SECONDS, TOKENS = 60, 48
ASK = {"prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}


class Releases:
    """A folder as slm-install keeps it: ``current`` leads to the version in use."""

    def __init__(self, folder: Path) -> None:
        self.current = folder / "current"

    def add(self, name: str, program: Path, bundle: Path) -> Path:
        made = self.current.parent / name
        made.mkdir()
        shutil.copy(program, made / "slm-serve")
        (made / "bundle").symlink_to(bundle)
        return made

    def switch(self, name: str) -> None:
        link = self.current.with_name(".new")
        link.symlink_to(name)
        link.rename(self.current)

    def serving(self, *options: str) -> contextlib.AbstractContextManager[Server]:
        return serving(self.current / "slm-serve", self.current / "bundle", options)


@pytest.fixture(scope="module")
def next_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The next version: the same model in int8."""
    return bundle_for(tmp_path_factory, "int8", ("host",))


@pytest.fixture(scope="module")
def texts(demo: Path, next_demo: Path) -> list[str]:
    """What sessions of both versions write."""
    found = []
    for bundle in (demo, next_demo):
        with load(bundle) as session:
            found.append("".join(generate_text(session, PROMPTS[0], TOKENS)))
    assert found[0] != found[1]
    return found


@pytest.fixture
def releases(tmp_path: Path, program: Path, demo: Path, next_demo: Path) -> Releases:
    made = Releases(tmp_path)
    made.add("1", program, demo)
    made.add("2", server_program(next_demo), next_demo)
    made.switch("1")
    return made


def stream(connection: http.client.HTTPConnection) -> Iterator[str]:
    """An answer's pieces; raises where it does not come whole."""
    body = json.dumps({**ASK, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    lines = []
    while line := answer.readline().decode().strip() or answer.readline().decode().strip():
        lines.append(line.removeprefix("data: "))
        if lines[-1] == "[DONE]":
            answer.read()
            return
        yield json.loads(lines[-1])["choices"][0]["text"]
    raise AssertionError(f"the stream was cut: {lines}")


def hang_up(server: Server, said: str) -> None:
    """SIGHUP; returns when the server has written a line with ``said``, of its output or errors."""
    server.process.send_signal(signal.SIGHUP)
    files = (server.process.stdout, server.process.stderr)
    assert files[0] and files[1]
    end, heard = time.monotonic() + SECONDS, ""
    while said not in heard or not heard.endswith("\n"):
        ready, _, _ = select.select(files, [], [], end - time.monotonic())
        assert ready, heard
        heard += os.read(ready[0].fileno(), 65536).decode()


@pytest.mark.parametrize("clients", [3])
def test_requests_that_come_while_it_switches_are_all_answered_whole(
    releases: Releases, texts: list[str], clients: int
) -> None:
    found: list[list[int]] = [[] for _ in range(clients)]
    failed: list[BaseException] = []
    switched = threading.Event()

    def ask(client: int, port: int, keeps: bool) -> None:
        """Requests one after the other, on one connection or a new one each."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            left = 3
            while left:
                left -= switched.is_set()
                found[client].append(texts.index("".join(stream(connection))))
                if not keeps:
                    connection.close()
            connection.close()
        except BaseException as error:
            failed.append(error)

    with releases.serving() as server:
        threads = [
            threading.Thread(target=ask, args=(n, server.port, n > 0)) for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        while not all(found):  # each has had an answer
            assert not failed, failed
            time.sleep(0.01)
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        assert "".join(stream(idle)) == texts[0]
        running = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        begun = stream(running)
        text = next(begun)
        releases.switch("2")
        hang_up(server, "goes on")
        switched.set()
        # A connection that had nothing to do is the new version's, what ran ends as it began.
        assert "".join(stream(idle)) == texts[1]
        assert text + "".join(begun) == texts[0]
        assert "".join(stream(running)) == texts[1]
        for thread in threads:
            thread.join(SECONDS)
        idle.close()
        running.close()
        assert not failed, failed
        for versions in found:
            assert versions == sorted(versions) and versions[-1] == 1, found
        # The process that was started stands for the new one, signals included.
        releases.switch("1")
        hang_up(server, "goes on")
        assert server.ask("/v1/completions", ASK)[1]["choices"][0]["text"] == texts[0]
        assert server.stop() == (0, "")
    with pytest.raises(ConnectionRefusedError):
        server.ask("/healthz")


def test_a_new_version_that_does_not_open_leaves_the_old_one(
    releases: Releases, program: Path, next_demo: Path, texts: list[str], tmp_path: Path
) -> None:
    damaged = shutil.copytree(next_demo, tmp_path / "damaged.slm")
    with (damaged / "weights.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    releases.add("damaged", server_program(next_demo), damaged)
    releases.add("mixed", program, next_demo)
    (releases.add("no program", program, next_demo) / "slm-serve").unlink()
    with releases.serving() as server:
        for name, why in (
            ("damaged", "weights.bin: damaged"), ("mixed", "weights.bin: "),
            ("no program", "cannot be started anew"), ("nowhere", "cannot be started anew"),
        ):  # fmt: skip
            releases.switch(name)
            hang_up(server, why)
            assert server.ask("/v1/completions", ASK)[1]["choices"][0]["text"] == texts[0]
        releases.switch("2")
        # What comes while one is being opened counts as well.
        server.process.send_signal(signal.SIGHUP)
        hang_up(server, "goes on")
        assert server.ask("/v1/completions", ASK)[1]["choices"][0]["text"] == texts[1]
        server.process.send_signal(signal.SIGTERM)
        _, errors = server.process.communicate(timeout=SECONDS)
        assert server.process.returncode == 0
        assert errors.count("this version stays") <= 4


def test_the_service_manager_follows_the_new_process(
    releases: Releases, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def heard(what: bytes) -> bytes:
            while what not in (message := manager.recv(200)):
                assert message in (b"READY=1", b"WATCHDOG=1"), message
            return message

        with releases.serving() as server:
            heard(b"READY=1")
            releases.switch("nowhere")
            server.process.send_signal(signal.SIGHUP)
            assert b"\nMONOTONIC_USEC=" in heard(b"RELOADING=1\n")
            assert heard(b"READY") == b"READY=1"  # as it was
            releases.switch("2")
            server.process.send_signal(signal.SIGHUP)
            heard(b"RELOADING=1")
            main, ready = heard(b"MAINPID=").decode().split("\n")
            assert ready == "READY=1"
            assert server.process.wait(SECONDS) == 0  # and nothing stands for it
            assert server.ask("/v1/completions", ASK)[1]["choices"][0]["text"] == texts[1]
            os.kill(int(main.removeprefix("MAINPID=")), signal.SIGTERM)
            heard(b"STOPPING=1")


def test_the_audit_log_goes_on_when_the_old_version_has_written_its_last_line(
    releases: Releases, tmp_path: Path, texts: list[str]
) -> None:
    log = tmp_path / "audit.jsonl"
    with releases.serving("--audit", str(log)) as server:
        running = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        begun = stream(running)
        text = next(begun)
        releases.switch("2")
        hang_up(server, "goes on")
        # It waits for the log, and is answered.
        assert server.ask("/v1/completions", ASK)[1]["choices"][0]["text"] == texts[1]
        assert text + "".join(begun) == texts[0]
        running.close()
        log.rename(tmp_path / "audit.1.jsonl")  # and another log may begin
        hang_up(server, "goes on")
        assert server.ask("/v1/completions", ASK)[0] == 200
    assert verify_log(tmp_path / "audit.1.jsonl").lines == 2
    assert verify_log(log).lines == 1


def test_a_key_that_comes_once_is_not_asked_for_again(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"ab" * 32)
    os.close(writing)
    monkeypatch.setenv("SLM_WEIGHTS_KEY", f"fd:{reading}")
    popen = subprocess.Popen

    def inheriting(*arguments: object, **more: object) -> subprocess.Popen[str]:
        return popen(*arguments, pass_fds=(reading,), **more)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(subprocess, "Popen", inheriting)
    with releases.serving() as server:
        os.close(reading)
        hang_up(server, "gives its key once")
        assert server.ask("/healthz")[0] == 200


def test_a_version_that_is_not_signed_as_wanted_is_not_served(
    releases: Releases, program: Path, demo: Path, tmp_path: Path
) -> None:
    generate_keys(tmp_path / "key.pem", tmp_path / "pub.pem")
    signed = shutil.copytree(demo, tmp_path / "signed.slm")
    sign_bundle(signed, key_signer(tmp_path / "key.pem"), counter=1, version="1.0")
    altered = shutil.copytree(signed, tmp_path / "altered.slm")
    with (altered / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    for name, bundle in (("signed", signed), ("again", signed), ("altered", altered)):
        releases.add(name, program, bundle)
    releases.switch("signed")
    with releases.serving("--keys", str(tmp_path / "pub.pem")) as server:
        for name, why in (("2", "manifest.json.sig"), ("altered", "tokenizer.json: ")):
            releases.switch(name)
            hang_up(server, why)
            assert server.ask("/healthz")[0] == 200
        releases.switch("again")
        hang_up(server, "goes on")
        assert server.ask("/v1/completions", ASK)[0] == 200
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate(timeout=SECONDS)
        assert server.process.returncode == 0
