"""How the next token is chosen: slm_sampling, put together and checked."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field

from slmtvm.errors import DeviceError
from slmtvm.runtime.interface import Bias, Sampling


@dataclass(frozen=True)
class Choosing:
    """What ``Session.sample`` and ``generate`` take, as they take it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    written: int = 0

    def struct(self) -> Sampling:
        """The C struct; it keeps alive what it points to. DeviceError for a number that is none."""
        pairs = self.logit_bias.items()
        biases = (Bias * len(pairs))(
            *(Bias(int32(t, "a token of logit_bias"), b) for t, b in pairs)
        )
        made = Sampling(
            ctypes.sizeof(Sampling), self.temperature, int32(self.top_k, "top_k"), self.top_p,
            self.min_p, self.repetition_penalty, self.seed & (2**64 - 1), self.presence_penalty,
            self.frequency_penalty, int32(self.written, "written"), len(biases),
        )  # fmt: skip
        made.biases = ctypes.cast(biases, ctypes.c_void_p)
        made.kept = biases
        return made


def int32(value: int, name: str) -> int:
    """``value``, if the C interface can take it; else DeviceError."""
    if not -(2**31) <= value < 2**31:
        raise DeviceError(f"{name} is {value}, out of range")
    return value
