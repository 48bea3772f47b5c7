"""slm-serve --audit: a line for each request, which nobody can change unseen."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slmtvm.audit import verify_log
from tests.codegen.programs.serving import Server, serving
from tests.small_disk import small_disk

pytestmark = pytest.mark.slow
ASK = {"prompt": "def read_file(path):", "max_tokens": 6, "temperature": 0}


def post(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", 0) as file:
        while True:
            file.write(bytes(512))


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_requests_and_answers_are_logged_by_their_hashes(
    program: Path, demo: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    bodies = [
        ("/v1/completions", json.dumps(ASK).encode()),
        ("/v1/completions", json.dumps({**ASK, "stream": True}).encode()),
        ("/v1/completions", b'{"prompt": 7'),
        ("/no\\thing", b"{}"),
    ]
    with serving(program, demo, ["--audit", str(log)]) as server:
        answers = [post(server, path, body) for path, body in bodies]
        assert server.ask("/healthz")[0] == 200
    assert [status for status, _ in answers] == [200, 200, 400, 404]
    assert log.stat().st_mode & 0o777 == 0o600
    assert verify_log(log).lines == len(bodies)
    for entry, (path, body), (status, answer) in zip(entries(log), bodies, answers, strict=True):
        assert (entry["path"], entry["status"], entry["whole"]) == (path, status, True)
        assert entry["request"] == hashlib.sha256(body).hexdigest()
        assert entry["answer"] == hashlib.sha256(answer).hexdigest()
    assert [entry["tokens"] for entry in entries(log)] == [6, 6, 0, 0]
    assert "read_file" not in log.read_text()
    # And the next server goes on where this one ended.
    with serving(program, demo, ["--audit", str(log)]) as server:
        post(server, *bodies[0])
    assert verify_log(log).lines == len(bodies) + 1


def test_an_answer_that_was_not_read_is_logged_as_cut(
    program: Path, demo: Path, tmp_path: Path
) -> None:
    log = tmp_path / "audit.jsonl"
    body = json.dumps({**ASK, "max_tokens": 250, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(program, demo, ["--audit", str(log)]) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
            raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert raw.recv(16)
        post(server, "/v1/completions", json.dumps(ASK).encode())
    assert verify_log(log).lines == 2
    cut, whole = sorted(entries(log), key=lambda entry: bool(entry["whole"]))
    assert (cut["whole"], cut["status"], whole["whole"]) == (False, 200, True)
    assert 0 < cut["tokens"] < 250


def test_what_cannot_be_logged_is_not_answered(program: Path, demo: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        log, filler = disk / "audit.jsonl", disk / "filler"
        with serving(program, demo, ["--audit", str(log)]) as server:
            assert server.ask("/v1/completions", ASK)[0] == 200
            fill(filler)
            statuses = [server.ask("/v1/completions", ASK)[0] for _ in range(20)]
            assert statuses[-1] == 503
            assert server.ask("/healthz")[0] == 200
            answered = statuses.count(200)
            filler.unlink()
            assert server.ask("/v1/completions", ASK)[0] == 200
        assert verify_log(log).lines == 1 + answered + 1


def test_other_files_are_left_alone(program: Path, demo: Path, tmp_path: Path) -> None:
    def refused(log: Path) -> str:
        result = subprocess.run(
            [str(program), str(demo), "--port", "0", "--audit", str(log)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"slm-serve: error: --audit {log}: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    other = tmp_path / "other"
    other.write_text("something else\n")
    assert "is no audit log" in refused(other)
    assert other.read_text() == "something else\n"
    other.write_text('{"line":1')
    assert "its last line has no end" in refused(other)
    assert "No such file" in refused(tmp_path / "no" / "folder")
    assert "must be a file" in refused(Path("/dev/null"))
    log = tmp_path / "audit.jsonl"
    with serving(program, demo, ["--audit", str(log)]):
        assert "another server writes it" in refused(log)
