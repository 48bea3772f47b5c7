"""What a decoded token takes on a Jetson, as a model of it says: nothing here is measured.

    python scripts/model_gpu.py MODEL.onnx [--position 256] [--node-us 2] [--barrier-us 1]
        [--reached 0.7]

A token reads every weight and the keys and values before it once, from memory; each kernel of the
CUDA graph costs something besides, and each barrier of the persistent kernel that does the same.
All three costs are assumptions, which can be given; activations are small enough for the cache, and
arithmetic hides behind reading.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from slmtvm.codegen.cuda.launches import schedule
from slmtvm.compiler import plan_model
from slmtvm.plan.model import Plan
from slmtvm.target import Target

# GB/s of memory, as NVIDIA's data sheets have it.
BOARDS = {
    "Orin Nano 8 GB": 68.0,
    "Orin Nano Super, NX 16 GB": 102.4,
    "AGX Xavier": 136.5,
    "AGX Orin 64 GB": 204.8,
    "AGX Thor": 273.0,
}
_FUNCTIONS = ("body", "head")  # of a decoded token, a launch of the persistent kernel each


@dataclass(frozen=True)
class Token:
    """Bytes that a decoded token reads from memory, and kernels that it launches."""

    bytes: int
    nodes: int

    def per_second(self, gb_per_second: float, seconds: float = 0.0) -> float:
        """How many a second where launches and waiting take ``seconds`` of each."""
        return 1 / (self.bytes / (gb_per_second * 1e9) + seconds)


def token_of(plan: Plan, position: int) -> Token:
    """A token of a decoder's ``plan`` behind ``position`` others."""
    gpu = Target.load("jetson-orin").cuda
    assert gpu is not None
    read, launches = 0, 0
    for function, nodes in schedule(plan, gpu).functions:
        if function.rows > 1 or function.name not in _FUNCTIONS:
            continue
        launches += len(nodes)
        for step in function.steps:
            work = plan.kernels[step.kernel].work
            attended = min(position, work.window) if work.window else position
            read += work.weight_bytes + work.context_bytes * attended
    return Token(read, launches)


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="Model decoding on a Jetson.")
    options.add_argument("model")
    options.add_argument("--position", type=int, default=256, help="tokens before (default 256)")
    options.add_argument(
        "--node-us", type=float, default=2.0, help="microseconds of a kernel's launch (default 2)"
    )
    options.add_argument(
        "--barrier-us", type=float, default=1.0, help="of a barrier of all blocks (default 1)"
    )
    options.add_argument(
        "--reached", type=float, default=0.7, help="part of the bandwidth reached (default 0.7)"
    )
    given = options.parse_args(arguments)
    plan = plan_model(given.model, Target.load("jetson-orin"))
    if plan.kind == "encoder":
        print(f"{given.model}: is an encoder, which decodes nothing", file=sys.stderr)
        return 2
    token = token_of(plan, given.position)
    print(
        f"{token.nodes} kernels and {token.bytes / 1e6:.1f} MB a token at position "
        f"{given.position}; modelled, not measured:"
    )
    print("| board | GB/s | reading alone | graph | persistent |\n|---|---|---|---|---|")
    node, barrier = given.node_us * 1e-6, given.barrier_us * 1e-6
    launched = len(_FUNCTIONS)
    for name, bandwidth in BOARDS.items():
        reached = bandwidth * given.reached
        rates = (
            token.per_second(bandwidth),
            token.per_second(reached, token.nodes * node),
            token.per_second(reached, launched * node + (token.nodes - launched) * barrier),
        )
        print(f"| {name} | {bandwidth:g} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
