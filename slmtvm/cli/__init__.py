"""The command ``slmtvm``: a file for each verb, each verb one call of the Python interface."""

from slmtvm.cli.main import main

__all__ = ["main"]
