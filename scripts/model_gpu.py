"""What a decoded token takes on a Jetson, as a model of it says: nothing here is measured.

    python scripts/model_gpu.py MODEL.onnx [--position 256] [--node-us 2] [--reached 0.7]

A token reads every weight and the keys and values before it once, from memory; each kernel of the
CUDA graph costs something besides. Both costs are assumptions, which can be given; activations are
small enough for the cache, and arithmetic hides behind reading.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from slmtvm.compiler import plan_model
from slmtvm.plan.model import Plan
from slmtvm.target import Target

# GB/s of memory, as NVIDIA's data sheets have it.
BOARDS = {
    "Orin Nano 8 GB": 68.0,
    "Orin Nano Super, NX 16 GB": 102.4,
    "AGX Orin 64 GB": 204.8,
    "AGX Thor": 273.0,
}


@dataclass(frozen=True)
class Token:
    """Bytes that a decoded token reads from memory, and kernels that it launches."""

    bytes: int
    nodes: int

    def per_second(self, gb_per_second: float, node_seconds: float) -> float:
        return 1 / (self.bytes / (gb_per_second * 1e9) + self.nodes * node_seconds)


def token_of(plan: Plan, position: int) -> Token:
    """A token of a decoder's ``plan`` behind ``position`` others."""
    steps = [
        step
        for function in plan.functions
        if function.rows == 1 and function.name in ("body", "head")
        for step in function.steps
    ]
    read = 0
    for step in steps:
        work = plan.kernels[step.kernel].work
        attended = min(position, work.window) if work.window else position
        read += work.weight_bytes + work.context_bytes * attended
    return Token(read, len(steps))


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="Model decoding on a Jetson.")
    options.add_argument("model")
    options.add_argument("--position", type=int, default=256, help="tokens before (default 256)")
    options.add_argument(
        "--node-us", type=float, default=2.0, help="microseconds of a kernel's launch (default 2)"
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
    print("| board | GB/s | reading alone | with launches | 1 launch |\n|---|---|---|---|---|")
    for name, bandwidth in BOARDS.items():
        reached = bandwidth * given.reached
        rates = (
            token.per_second(bandwidth, 0),
            token.per_second(reached, given.node_us * 1e-6),
            Token(token.bytes, 1).per_second(reached, given.node_us * 1e-6),
        )
        print(f"| {name} | {bandwidth:g} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
