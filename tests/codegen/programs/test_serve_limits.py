"""Who may ask slm-serve, how long, and how it ends."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.codegen.programs.serving import Server, client_of, metrics_of, serving
from tests.end_to_end.bundles import CONTEXT

pytestmark = pytest.mark.slow


def test_a_key_is_asked_for(program: Path, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-ours\n")
    with serving(program, demo, ["--key-file", str(tmp_path / "key")]) as server:
        for given in (None, "Bearer secret-of-our", "Bearer secret-of-ours2", "secret-of-ours"):
            headers = {} if given is None else {"Authorization": given}
            status, answer = server.ask("/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer secret-of-ours"}
        assert server.ask("/v1/models", headers=right)[0] == 200
        assert server.ask("/healthz")[0] == 200


def test_a_page_of_another_name_that_leads_here_is_turned_away(server: Server) -> None:
    status, answer = server.ask("/v1/models", headers={"Host": "evil.example"})
    assert (status, answer["error"]["code"]) == (403, "foreign_host")
    assert server.ask("/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_the_queue_has_an_end(program: Path, demo: Path) -> None:
    options = ["--sessions", "1", "--queue", "0"]
    with serving(program, demo, options) as server:
        slow = {"prompt": "x", "max_tokens": CONTEXT, "temperature": 2, "seed": 1}
        statuses = []
        threads = [
            threading.Thread(target=lambda: statuses.append(server.ask("/v1/completions", slow)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 200 in statuses and set(statuses) <= {200, 503}
        assert server.ask("/healthz") == (200, {"status": "ok"})


def test_who_goes_away_is_not_computed_for(program: Path, demo: Path) -> None:
    with serving(program, demo, ["--sessions", "1"]) as server:
        body = b'{"prompt": "x", "max_tokens": 100000, "temperature": 2, "stream": true}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head + body)
            assert raw.recv(1)
        until = time.monotonic() + 30
        while metrics_of(server)["slm_num_requests_running"] and time.monotonic() < until:
            time.sleep(0.05)
        told = metrics_of(server)
        assert told["slm_num_requests_running"] == 0
        if told["slm_requests_cancelled_total"] == 0:  # it was written before that was seen
            assert told["slm_request_success_total{finished_reason=length}"] == 1


def test_a_request_that_takes_too_long_is_ended(program: Path, demo: Path) -> None:
    ask = {"prompt": "x", "max_tokens": CONTEXT, "temperature": 2, "seed": 1}
    with serving(program, demo, ["--timeout", "0.001"]) as server:
        status, answer = server.ask("/v1/completions", ask)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        status, events = server.ask("/v1/completions", {**ask, "stream": True})
        if status == 200:  # it had begun: the error is its last event
            assert '"code":"timeout"' in events.strip().splitlines()[-1]
        else:
            assert (status, events["error"]["code"]) == (504, "timeout")


def test_a_body_may_wait_for_leave_to_come(server: Server) -> None:
    body = b'{"content": "x"}'
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(head)
        assert raw.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(body)
        assert b"".join(iter(lambda: raw.recv(4096), b"")).startswith(b"HTTP/1.1 200 OK")


def test_sigterm_lets_what_runs_finish(program: Path, demo: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(program, demo))
        client = stack.enter_context(client_of(server))
        stream = client.completions.create(
            model=demo.name.removesuffix(".slm")[:127], prompt="x", max_tokens=200, stream=True,
            temperature=0,
        )  # fmt: skip
        events = iter(stream)
        next(events)
        code, errors = server.stop()
        assert (code, errors) == (0, "")
        assert [e.choices[0].finish_reason for e in events][-1] in ("length", "stop")


def test_the_command_becomes_the_server(program: Path, demo: Path) -> None:
    command = [sys.executable, "-m", "slmtvm.cli", "--quiet"]
    with serving(Path("serve"), demo, ["--name", "ours"], emulator=command) as server:
        assert server.ask("/v1/models/ours")[0] == 200


def test_a_unix_socket_serves_its_owner(program: Path, demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "slm.sock"
    with subprocess.Popen(
        [program, demo, "--unix", path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline().endswith(f"unix:{path}\n")
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: raw.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b'{"status":"ok"}')
        process.terminate()
        assert process.wait(30) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 64, "usage: slm-serve BUNDLE"),
        (["{bundle}", "--colour", "x"], 64, "there is no option --colour"),
        (["{bundle}", "--port", "70000"], 64, "--port cannot be 70000"),
        (["{bundle}", "--host", "0.0.0.0"], 64, "is open to other machines"),
        (["{bundle}", "--host", "here.example", "--open"], 1, "is no address"),
        (["{bundle}", "--key-file", "/no/file"], 1, "/no/file: No such file"),
        (["/no/bundle"], 1, "/no/bundle"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_one_line(
    program: Path, demo: Path, options: list[str], code: int, message: str
) -> None:
    given = [option.format(bundle=demo) for option in options]
    result = subprocess.run([program, *given], capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert message in result.stderr
