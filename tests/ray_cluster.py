"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
_START = """
import sys
from ray.cluster_utils import Cluster

client, *ports = map(int, sys.argv[1:])
names = "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", \
"runtime_env_agent_port"
common = {"num_cpus": 1, "object_store_memory": 200 << 20}
cluster = Cluster(
    initialize_head=True,
    shutdown_at_exit=True,
    head_node_args={
        **common, **dict(zip(names, ports[:4])), "include_dashboard": False,
        "include_log_monitor": False, "ray_client_server_port": client,
    },
)
cluster.add_node(wait=False, **common, **dict(zip(names, ports[4:])))
cluster.wait_for_nodes(timeout=300)
print("ready", flush=True)
input()
cluster.shutdown()
"""

_PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_usage_stats_enabled": "0",
}
"""Ray gives its processes half a minute to import what they need, a busy machine takes longer."""


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Its address, "ray://HOST:PORT"; skips where ray is missing.

    A node waits 15 seconds for its agent, which nothing makes longer. Of these, three of processor
    time would go for each process to the grammar of addresses that jsonschema builds wherever
    rfc3987_syntax is installed, so that this is kept from them.
    """
    for module in ("ray", "grpc"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is missing: pip install 'slmtvm[cluster]'")
    client, *ports = _free_ports(9)
    with TemporaryDirectory(prefix="slm-ray-") as folder, TemporaryFile("w+") as errors:
        (Path(folder) / "rfc3987_syntax.py").write_text("raise ImportError('left out')\n")
        path = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, [client, *ports])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder,
            env={**os.environ, **_PATIENCE, "RAY_TMPDIR": folder, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                errors.seek(0)
                pytest.fail(f"ray does not start: {errors.read()[-2000:]}")
            yield f"ray://127.0.0.1:{client}"
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.communicate("\n", timeout=120)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
