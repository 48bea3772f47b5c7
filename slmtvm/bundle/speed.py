"""The speed that a bundle's manifest states: what `slmtvm bench --json` measured, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.files import read_text

KINDS = ("board", "emulated", "modelled")
_MAX_BYTES = 16 << 20
_RATE = ("phase", "threads", "position", "tokens", "tokens_per_second")
_TAKEN = ("cpu", "target", "load_ms", "first_token_ms")


def read_speed(file: str | Path, kind: str) -> dict[str, Any]:
    """JSON values for the manifest's ``extra.bench``: machine, target, times and rates.

    kind: "board" for what a device measured itself; what an emulator or a model says is no speed
    of a device, and is told apart so. Raises SlmError where ``file`` is no report of bench.
    """
    if kind not in KINDS:
        raise SlmError(f"{kind!r} must be one of {', '.join(KINDS)}", where="kind")
    try:
        table = json.loads(read_text(file, _MAX_BYTES))
        rates = [{name: rate[name] for name in _RATE} for rate in table["rates"]]
        return {"kind": kind, **{name: table[name] for name in _TAKEN}, "rates": rates}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SlmError("is no report of `slmtvm bench --json`", where=f"{file}") from error
