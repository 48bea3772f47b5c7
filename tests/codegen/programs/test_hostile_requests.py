"""Whatever is sent to slm-serve, it goes on, and the sanitizers find nothing."""

from __future__ import annotations

import random
import socket
import threading
import time
from pathlib import Path

import pytest

from slmtvm.audit import verify_log
from slmtvm.compiler import compile_model
from slmtvm.target import host_target
from slmtvm.text.chat import ChatTemplate, compile_chat
from tests.codegen.programs.hostile import any_request, send
from tests.codegen.programs.serving import Server, save_words, serving
from tests.codegen.sanitized import gcc, objects
from tests.importer.heads import ENCODERS, save_head
from tests.text.chat_templates import TAGS, TOKENS

pytestmark = pytest.mark.slow
SANITIZERS = "address,undefined"
REQUESTS, MOST_REQUESTS = 400, 10_000
CLIENTS = 8
SOURCES = ("serve", "shared_")  # of slm-serve
OPTIONS = ["--connections", "6", "--sessions", "2", "--queue", "3", "--read-timeout", "1"]


@pytest.fixture(scope="module")
def checked_objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The runtime and slm-serve, compiled under sanitizers."""
    runtime = objects(tmp_path_factory, SANITIZERS, "runtime")
    parts = [objects(tmp_path_factory, SANITIZERS, "programs", f"{p}*.c") for p in SOURCES]
    return [*runtime, *parts[0], *parts[1]]


def link(objects: list[str], bundle: Path, folder: Path) -> Path:
    """slm-serve of the bundle."""
    model = bundle.absolute() / "lib" / f"{host_target().name}.o"
    program = folder / "slm-serve"
    gcc(SANITIZERS, [*objects, str(model), "-lm", "-pthread", "-o", program.name], folder)
    return program


@pytest.fixture(scope="module")
def checked_program(
    checked_objects: list[str], demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return link(checked_objects, demo, tmp_path_factory.mktemp("checked"))


def attack(server: Server, seed: int, count: int) -> None:
    """``count`` hostile requests, of several clients at the same time."""

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", server.port), timeout=20)

    def client(number: int) -> None:
        for i in range(number, count, CLIENTS):
            r = random.Random(f"{seed} {i}")
            answer = send(r, connect, any_request(r))
            assert answer[:9] in (b"", b"HTTP/1.1 ") or len(answer) < 9, (i, answer[:80])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answers_again(server: Server) -> None:
    """A request is answered once those before it are over."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            ask = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0}
            status, answer = server.ask("/v1/completions", ask)
            if status == 200:
                assert answer["usage"]["completion_tokens"] == 8
                return
        except OSError:  # all connections are taken still
            pass
        time.sleep(0.1)
    pytest.fail("the server does not answer any more")


@pytest.fixture
def tools_bundle(chat_bundle: Path, tmp_path: Path) -> Path:
    """The bundle with a template that has tools."""
    bundle = tmp_path / "tools.slm"
    bundle.mkdir()
    for file in chat_bundle.iterdir():
        if file.name != "chat.json":
            (bundle / file.name).symlink_to(file.resolve())
    pieces = compile_chat(ChatTemplate(TAGS, TOKENS))
    (bundle / "chat.json").write_bytes(pieces.to_json())
    return bundle


@pytest.mark.parametrize(
    "count", [REQUESTS, pytest.param(MOST_REQUESTS, marks=pytest.mark.exhaustive)]
)
def test_hostile_requests_leave_the_sanitizers_silent_and_the_server_alive(
    checked_program: Path, tools_bundle: Path, tmp_path: Path, count: int
) -> None:
    log = tmp_path / "audit.jsonl"
    with serving(checked_program, tools_bundle, [*OPTIONS, "--audit", str(log)]) as server:
        attack(server, 1, count)
        answers_again(server)
    assert verify_log(log).lines > 0


def test_hostile_requests_for_embeddings_leave_them_silent(
    checked_objects: list[str], tmp_path: Path
) -> None:
    model = save_head(ENCODERS["pooler"], tmp_path)
    save_words(tmp_path)
    bundle = tmp_path / "words.slm"
    compile_model(model, output=bundle)
    with serving(link(checked_objects, bundle, tmp_path), bundle, OPTIONS) as server:
        attack(server, 4, REQUESTS // 2)
        status, answer = server.ask("/v1/embeddings", {"input": ["w1", "w2"]})
        assert status == 200 and len(answer["data"]) == 2


def test_a_slow_request_is_ended_and_others_are_served_meanwhile(
    checked_program: Path, demo: Path
) -> None:
    with serving(checked_program, demo, OPTIONS) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
            answers_again(server)
            got = b"".join(iter(lambda: raw.recv(4096), b""))
        assert got.startswith(b"HTTP/1.1 408 ")


def test_requests_that_lie_together_are_answered_in_order(
    checked_program: Path, demo: Path
) -> None:
    asked = (b"/healthz", b"/v1/models", b"/nothing", b"/healthz")
    heads = b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in asked)
    with (
        serving(checked_program, demo, OPTIONS) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw,
    ):
        raw.sendall(heads + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = b"".join(iter(lambda: raw.recv(4096), b""))
    statuses = [part[:3] for part in got.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"404", b"200", b"200"]


@pytest.mark.exhaustive
def test_memory_stays_as_it_is_for_ten_minutes(program: Path, chat_bundle: Path) -> None:
    """In the first half rare requests still touch pages that were taken, and not used before."""
    seed = 2

    def resident_after(seconds: float) -> int:
        nonlocal seed
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            attack(server, seed, 300)
            seed += 1
        answers_again(server)
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])

    with serving(program, chat_bundle, OPTIONS) as server:
        before = resident_after(300)
        assert resident_after(300) <= before + 64  # pages
