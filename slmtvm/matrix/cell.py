"""One cell in a process of its own: a request as JSON on standard input, the result on the last
line of standard output."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slmtvm.errors import SlmError
from slmtvm.matrix.result import CellResult
from slmtvm.matrix.spec import Cell
from slmtvm.without_torch import import_no_torch


def run_cell(cell: Cell) -> CellResult:
    """Compile ``cell`` in a new process, whose end, however it comes, is a result."""
    started = time.monotonic()
    request = {
        "model": str(cell.path.absolute()), "target": cell.target,
        "output": str(cell.output.absolute()),
        "options": {**cell.options, **{k: str(v.absolute()) for k, v in cell.files.items()}},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "slmtvm.matrix.cell"], input=json.dumps(request),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told: dict[str, Any]
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        told = {"error": f"its process ended with {how}{': ' + said[-1] if said else ''}"}
    return CellResult(
        cell.model, cell.target, str(cell.output), round(time.monotonic() - started, 2), **told
    )


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    from slmtvm.compiler import compile_model

    bundle = compile_model(
        request["model"], [request["target"]], output=request["output"], **request["options"]
    )
    manifest = bundle.manifest
    return {
        "library_bytes": manifest.targets[request["target"]].library.bytes,
        "weights_bytes": manifest.weights.bytes,
        "check": manifest.extra.get("check"),
    }


def main() -> None:
    import_no_torch()
    request = json.load(sys.stdin)
    Path(request["output"]).parent.mkdir(parents=True, exist_ok=True)
    try:
        told = _compile(request)
    except SlmError as error:
        told = {"error": " ".join(str(error).split())}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
