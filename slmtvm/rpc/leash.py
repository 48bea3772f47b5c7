"""A process of our own that serves us, says where in one line, and ends when we do.

It holds its standard input and ends with it, however this process comes to its end.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from types import TracebackType

from slmtvm.errors import RpcError

_SECONDS = 10.0  # that it may take to clean up


class Leashed:
    """``command`` from its first line on standard output, ``said``, to ``close``.

    Raises RpcError, with its last words, where it ends before.
    """

    def __init__(self, command: Sequence[str], name: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout
        self.said = self._process.stdout.readline().decode().strip()
        if not self.said:
            why = self.last_words()
            self.close()
            raise RpcError(f"does not start: {why or 'it says nothing'}", where=name)

    def last_words(self) -> str:
        """The last line of its standard error so far."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Leashed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
