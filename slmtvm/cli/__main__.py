"""The command ``slmtvm``, also ``python -m slmtvm.cli``: a process of its own."""

from __future__ import annotations

import sys

from slmtvm.cli.main import main


def command() -> int:
    """Run the command of this process; returns the exit code."""
    # TVM imports torch wherever that is installed, which takes seconds; nothing here uses it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    return main()


if __name__ == "__main__":
    sys.exit(command())
