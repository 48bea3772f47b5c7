"""The command ``slmtvm``, also ``python -m slmtvm.cli``: a process of its own."""

from __future__ import annotations

import sys

from slmtvm.cli.main import main
from slmtvm.without_torch import import_no_torch


def command() -> int:
    """Run the command of this process; returns the exit code."""
    import_no_torch()
    return main()


if __name__ == "__main__":
    sys.exit(command())
