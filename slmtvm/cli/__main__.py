"""The command ``slmtvm``, also ``python -m slmtvm.cli``: a process of its own."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

from slmtvm.cli.main import main


class _WithoutTorch(MetaPathFinder):
    """TVM imports torch wherever that is installed, which takes seconds; nothing here uses it.

    A None in sys.modules would do as well, but not for those who look there whether it is imported.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "torch":
            raise ModuleNotFoundError("slmtvm needs no torch", name=name)


def command() -> int:
    """Run the command of this process; returns the exit code."""
    sys.meta_path.insert(0, _WithoutTorch())
    return main()


if __name__ == "__main__":
    sys.exit(command())
