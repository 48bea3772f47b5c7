"""The argument parser: wrong usage is one line, which says what was probably meant."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from slmtvm.files import did_you_mean

USAGE = 64  # EX_USAGE of sysexits.h; argparse's own 2 is what `verify` ends with


class Parser(argparse.ArgumentParser):
    """argparse's, but for how it ends; its verbs are parsers like it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"there is no {value!r}; choose from {', '.join(choices)}"
                + did_you_mean(str(value), choices),
            )
