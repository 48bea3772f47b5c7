"""What a setting costs on a GPU by a model of it, without a device: nothing here is measured.

A team asks for the weights of its tile a few vectors at a time and waits for memory in between; so
what matters is how many teams there are to ask, and in how many turns they do the grid. All numbers
of the GPU but those of its target are assumptions, the same for every setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slmtvm.codegen.cuda.launches import Launch, launch
from slmtvm.codegen.cuda.nodes import SHARED_BYTES, single
from slmtvm.codegen.cuda.text import teams_of
from slmtvm.codegen.cuda.translate import translate
from slmtvm.plan.model import Ref, Space
from slmtvm.schedules import isa as isas
from slmtvm.schedules.isa.cuda import LANES
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.linear import LinearShape, packed_weights
from slmtvm.schedules.linear.knobs import Knobs
from slmtvm.schedules.templates import TEMPLATES
from slmtvm.target import CudaTarget, Target
from slmtvm.tuning.tasks import TaskKey

_LATENCY = 0.7e-6  # seconds from asking memory to having it
_LAUNCH = 2e-6  # seconds of a launch, as scripts/model_gpu.py assumes
_REACHED = 0.7  # of the memory's bandwidth
_THREADS_AT_ONCE = 512  # of a multiprocessor: what kernels' launch bounds leave registers for
_PRODUCTS = 128 * 4 * 1e9  # a second, of a multiprocessor's dp4a
_UNROLLED = 2  # times that NVIDIA's compiler unrolls a loop, as machine code shows


class GpuModel:
    """Costs of kernels on the GPU of ``target``, as ``StaticModel`` has those of a CPU."""

    by = "a model of the GPU"

    def __init__(self, target: Target) -> None:
        assert target.cuda is not None
        self._gpu, self._isa = target.cuda, isas.get(target.isa)
        self._bytes_per_second = _REACHED * target.cuda.read_gb_per_second * 1e9

    def costs(self, key: TaskKey, settings: Sequence[Knobs]) -> list[float]:
        """Of each setting: seconds of a launch."""
        template, found = TEMPLATES[key.kind], []
        layer = getattr(key.shape, "layer", key.shape)
        linear = hasattr(layer, "bits")
        weights = (
            sum(
                math.prod(t.shape) * np.dtype(t.dtype).itemsize
                for t in packed_weights(layer, self._isa)
            )
            if linear
            else 0
        )
        for knobs in settings:
            kernel = template.build(key.shape, self._isa, knobs)
            tiles = -(-layer.n // (knobs["nv"] * LANES)) if linear else kernel.grid
            asked = _asked(layer, knobs) if linear else 4 * LANES
            found.append(self._seconds(kernel, asked, weights, weights / tiles))
        return found

    def _seconds(self, kernel: Kernel, asked: int, weights: float, tile_bytes: float) -> float:
        spread = _spread(kernel, self._gpu)
        each_has, teams = self._at_once(spread)
        turns = -(-kernel.grid // teams)
        products = kernel.work.multiply_adds / kernel.grid
        each = max(
            _LATENCY * (1 + math.ceil(tile_bytes / asked)),
            # Tiles above one another read the same weights, which then lie in the cache.
            weights * min(1.0, teams / kernel.grid) / self._bytes_per_second,
            each_has * products / _PRODUCTS,
        )
        return _LAUNCH + turns * each

    def _at_once(self, spread: Launch) -> tuple[int, int]:
        """Teams that run together, on the multiprocessor that has most, and in all."""
        blocks = max(1, _THREADS_AT_ONCE // (spread.teams * LANES))
        if spread.shared_bytes:
            blocks = max(1, min(blocks, 2 * SHARED_BYTES // spread.shared_bytes))
        most = min(blocks, -(-spread.blocks // self._gpu.multiprocessors))
        return most * spread.teams, min(
            spread.blocks, blocks * self._gpu.multiprocessors
        ) * spread.teams


def _asked(layer: LinearShape, knobs: Knobs) -> int:
    """Bytes of weights that a team asks for before it needs the first."""
    k = min(knobs.get("ku", 1), layer.group_size or layer.k)
    words = max(1, k * layer.bits // 32) * max(_UNROLLED, knobs.get("gu", 1))
    return words * knobs["nv"] * 4 * LANES


def _spread(kernel: Kernel, gpu: CudaTarget) -> Launch:
    scratch = kernel.tensors[-1].name == "scratch"
    teams = teams_of(kernel.tunable)
    made = translate("candidate", kernel.func, kernel.scalars, scratch, teams)
    node = single(made, [Ref(Space.ARENA, 0, 0)] * len(kernel.tensors), kernel.grid)
    return launch(node, gpu)
