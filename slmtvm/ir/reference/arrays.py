"""The types that the reference computes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Attrs = Mapping[str, Any]  # of an op
