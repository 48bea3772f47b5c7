"""What slm-serve tells the service manager that started it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.codegen.programs.serving import serving

SECONDS = 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_the_service_manager_hears_that_it_is_ready_alive_and_ending(
    program: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = f"@slm-{os.getpid()}" if kind == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name[1:]}" if kind == "abstract" else name)
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with serving(program, demo) as server:
            heard = [manager.recv(100) for _ in range(4)]
            assert heard == [b"READY=1", *[b"WATCHDOG=1"] * 3]
            assert server.stop() == (0, "")
            while heard[-1] == b"WATCHDOG=1":
                heard.append(manager.recv(100))
        assert heard[-1] == b"STOPPING=1"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "relative", "/" + "x" * 200, "/nowhere/notify"])
def test_a_service_manager_that_is_not_there_is_none(
    program: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with serving(program, demo) as server:
        assert server.ask("/healthz")[0] == 200
