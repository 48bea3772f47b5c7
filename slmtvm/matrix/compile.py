"""The public call: models times targets, in parallel, one summary."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from slmtvm.matrix.cell import run_cell
from slmtvm.matrix.cluster import run_on_cluster
from slmtvm.matrix.result import CellResult, MatrixReport
from slmtvm.matrix.spec import Cell, read_matrix


def compile_matrix(
    path: str | Path,
    *,
    output: str | Path | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    progress: Callable[[CellResult, int, int], None] = lambda *_: None,
) -> MatrixReport:
    """Compile every model of the file ``path`` for each of its targets, each in a process of its
    own; what fails does not keep the rest.

    output: the folder for the bundles MODEL.TARGET.slm, in the place of the file's own. jobs: how
    many at a time on this machine, by default one for each core. cluster: on a Ray cluster instead,
    "ray://HOST:PORT" or what else ``ray.init`` takes, whose nodes have slmtvm installed. progress:
    called with each result, how many there are now, and of how many. Raises SlmError where the file
    is not as it must be, or the cluster cannot be used.
    """
    cells = read_matrix(path, output)
    started = time.monotonic()
    results: dict[str, CellResult] = {}
    running = run_on_cluster(cells, cluster) if cluster else _run_here(cells, jobs)
    for result in running:
        results[f"{result.model}.{result.target}"] = result
        progress(result, len(results), len(cells))
    ordered = tuple(results[cell.name] for cell in cells)
    return MatrixReport(ordered, round(time.monotonic() - started, 2))


def _run_here(cells: Sequence[Cell], jobs: int | None) -> Iterator[CellResult]:
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(run_cell, cell) for cell in cells]
        try:
            for future in as_completed(running):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
