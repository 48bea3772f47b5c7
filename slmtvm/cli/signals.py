"""Signals that end the process, as exceptions: what is half-written is removed on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGINT is one already: KeyboardInterrupt.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """The signal ``number`` asked this process to end.

    A SystemExit, because an event loop keeps whatever else a callback of it raises to itself.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwinding() -> Iterator[None]:
    """Raise Terminated where SIGTERM or SIGHUP comes; one that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ENDING}
    taken = [number for number in _ENDING if before[number] is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _raise(number: int, frame: FrameType | None) -> None:
    del frame
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise Terminated(number)
