"""A compiled constraint, opened by the library that follows it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.runtime.interface import TEXT_IS_OVER, Library

if TYPE_CHECKING:
    from slmtvm.text.constraint import CompiledConstraint


class Constraint:
    """What may follow, by state; 0 is that of a text's start. ``close`` it when it is not needed.

    ``handle`` is what slm_sampling takes.
    """

    def __init__(self, library: Library, given: str | Path | CompiledConstraint) -> None:
        """Open a file, or what ``slmtvm.constrain`` returned.

        Raises BundleError where it cannot be read, ConstraintError where it is damaged.
        """
        self.handle = ctypes.c_void_p()
        self._library = library
        if isinstance(given, str | Path):
            self._open(Path(given))
            return
        with tempfile.TemporaryDirectory(prefix="slm-") as folder:
            path = Path(folder) / "constraint"
            path.write_bytes(given.content)
            self._open(path)

    def _open(self, path: Path) -> None:
        self._library.call("slm_constraint_open", os.fsencode(path), ctypes.byref(self.handle))

    def close(self) -> None:
        """Unmap the tables; closing twice is allowed."""
        self._library.call("slm_constraint_close", self.handle)
        self.handle = ctypes.c_void_p()

    def next(self, state: int, token: int) -> int:
        """The state behind ``token``; TEXT_IS_OVER where it ends the text.

        Raises ConstraintError where it may not follow.
        """
        return self._library.call("slm_constraint_next", self.handle, state, token)

    def left(self, state: int) -> int:
        """How many tokens must follow until the text is whole: 0 where it is."""
        return max(0, self._left(state))

    def is_over(self, state: int) -> bool:
        """Whether nothing can follow."""
        return self._left(state) == TEXT_IS_OVER

    def _left(self, state: int) -> int:
        return self._library.call("slm_constraint_left", self.handle, state)
