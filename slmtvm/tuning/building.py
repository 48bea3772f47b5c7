"""Who builds the programs that measure: this process, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from slmtvm.cluster import first_line
from slmtvm.errors import SlmError
from slmtvm.target import Target
from slmtvm.tuning.measuring import Batch, BatchProgram


class Builder(Protocol):
    """Builds programs of batches."""

    def __call__(self, batches: Sequence[Batch], target: Target) -> list[BatchProgram]:
        """In order. Raises SlmError where something cannot be compiled."""


def build_here(progress: Callable[[str], None] = lambda _: None) -> Builder:
    """A builder of this process."""

    def build(batches: Sequence[Batch], target: Target) -> list[BatchProgram]:
        return [BatchProgram(batch, target, progress) for batch in batches]

    return build


def build_on(ray: Any) -> Builder:
    """A builder of the cluster that ``ray`` is connected with: a task for each batch."""
    task = ray.remote(num_cpus=1, max_retries=2)(_build)

    def build(batches: Sequence[Batch], target: Target) -> list[BatchProgram]:
        plain = replace(target)  # without what TVM made of it, which does not travel
        try:
            made: list[BatchProgram] = ray.get([task.remote(b, plain) for b in batches])
        except ray.exceptions.RayError as error:
            raise SlmError(f"the cluster cannot build: {first_line(error)}") from error
        return made

    return build


def _build(batch: Batch, target: Target) -> BatchProgram:
    return BatchProgram(batch, target)
