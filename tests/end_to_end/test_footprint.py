"""What a compiled model takes: bytes of library on disk, bytes of memory as it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.runtime import load
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import CACHES, CONTEXT, RUNNABLE, bundle_for, bundle_of_all_targets
from tests.models import heldout_ids

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
MAX_LIBRARY_BYTES = 400_000
# The process and its C library take a little besides what the manifest predicts.
MAX_MEMORY_RATIO = 1.1
MAX_MEMORY_MORE = 3_000_000


@pytest.mark.slow
@pytest.mark.parametrize("form", CACHES)
@pytest.mark.parametrize("target", RUNNABLE)
def test_a_library_without_weights_is_small(
    form: str, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = bundle_of_all_targets(tmp_path_factory, form)
    size = (bundle / "lib" / f"{target}.so").stat().st_size
    print(f"{form} on {target}: {size} bytes")
    assert size < MAX_LIBRARY_BYTES


def test_a_process_takes_the_memory_that_the_manifest_predicts(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    path = bundle_for(tmp_path_factory, "demo", ("host",))
    target = Target.load("host")
    (session,) = open_sessions(path, target, tmp_path)
    # All of the context, so that every page of the cache is touched.
    resident = session.peak_resident_bytes(heldout_ids()[: CONTEXT - 8], 8)
    memory = Bundle.open(path).manifest.targets[target.name].memory
    predicted = sum(memory.values())
    print(f"predicted {predicted} bytes, resident {resident} bytes")
    assert resident < predicted * MAX_MEMORY_RATIO + MAX_MEMORY_MORE
    # The prediction is no wild guess on the safe side either.
    assert resident > predicted * 0.8


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="this kernel has no large pages")
def test_weights_are_asked_for_by_large_pages(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = bundle_for(tmp_path_factory, "demo", ("host",))
    with load(path):
        maps = Path("/proc/self/smaps").read_text()
    _, _, ours = maps.partition(f"{path.resolve()}/weights.bin")
    flags = re.search(r"^VmFlags:(.*)$", ours, re.MULTILINE)
    assert flags is not None and "hg" in flags[1].split()
