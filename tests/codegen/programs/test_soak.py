"""slm-serve under load for ten minutes: the same answers and the same memory to the end."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from pathlib import Path

import pytest

from tests.codegen.programs.serving import Server, serving
from tests.models import PROMPTS

pytestmark = pytest.mark.exhaustive
SECONDS, WARM_UP_SECONDS = 600, 30
CLIENTS, SESSIONS = 8, 4
MOST_TOKENS = 48
GROWTH_BYTES = 512 << 10  # buffers that only a rare request reaches to their end


class Client(threading.Thread):
    """Asks for one text after the other, and now and then goes away before it has it."""

    def __init__(self, server: Server, number: int, until: float) -> None:
        super().__init__()
        self.server, self.random, self.until = server, random.Random(number), until
        self.texts: dict[tuple[str, int], set[str]] = {}
        self.requests = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.until and not self.wrong:
            prompt, tokens = self.random.choice(PROMPTS), self.random.randint(1, MOST_TOKENS)
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
            given = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), given)
            if self.random.random() < 0.9:
                answer = connection.getresponse()
                text = answer.read().decode()
                if answer.status == 200:
                    written = json.loads(text)["choices"][0]["text"]
                    self.texts.setdefault((prompt, tokens), set()).add(written)
                else:
                    self.wrong.append(text)
            connection.close()
            self.requests += 1


def soak(server: Server, seconds: float) -> list[Client]:
    clients = [Client(server, i, time.monotonic() + seconds) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [client.wrong for client in clients] == [[]] * CLIENTS
    return clients


def resident_bytes(server: Server) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096


def test_ten_minutes_of_eight_clients_take_no_more_memory_and_change_no_text(
    program: Path, demo: Path
) -> None:
    with serving(program, demo, ["--sessions", str(SESSIONS)]) as server:
        soak(server, WARM_UP_SECONDS)
        before = resident_bytes(server)
        clients = soak(server, SECONDS)
        assert resident_bytes(server) - before <= GROWTH_BYTES
    assert sum(client.requests for client in clients) > 10 * CLIENTS
    found: dict[tuple[str, int], set[str]] = {}
    for client in clients:
        for asked, texts in client.texts.items():
            found.setdefault(asked, set()).update(texts)
    assert {len(texts) for texts in found.values()} == {1}
