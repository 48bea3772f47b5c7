"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Its address; skips where ray is missing."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is missing: pip install 'slmtvm[cluster]'")
    code = (
        "from ray.cluster_utils import Cluster\n"
        "c = Cluster(initialize_head=True, head_node_args={'num_cpus': 1,"
        " 'object_store_memory': 200 << 20, 'include_dashboard': False})\n"
        "c.add_node(num_cpus=1, object_store_memory=200 << 20)\n"
        "c.wait_for_nodes()\n"
        "print(c.address, flush=True)\n"
        "input()\n"
        "c.shutdown()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            pytest.fail("ray does not start here; its nodes have half a minute to, which a busy "
                        "machine may not keep")  # fmt: skip
        yield address
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate("\n", timeout=60)
