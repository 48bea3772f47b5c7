"""Keeps torch out of a process that compiles."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class _WithoutTorch(MetaPathFinder):
    """TVM imports torch wherever that is installed, which takes seconds; nothing here uses it.

    A None in sys.modules would do as well, but not for those who look there whether it is imported.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "torch":
            raise ModuleNotFoundError("slmtvm needs no torch", name=name)


def import_no_torch() -> None:
    """From now on, this process finds no torch: for processes that are slmtvm's own."""
    sys.meta_path.insert(0, _WithoutTorch())
