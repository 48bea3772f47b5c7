"""What a verb found, for people and as a file."""

from __future__ import annotations

import argparse
import json
from typing import Any, Protocol

from slmtvm.cli.files import write_text


class Report(Protocol):
    """Prints itself as a table."""

    def to_json(self) -> dict[str, Any]: ...


def show_report(report: Report, options: argparse.Namespace) -> None:
    """Print ``report`` unless --quiet, and write it where --json says."""
    if not options.quiet:
        print(report)
    if options.json:
        write_text(options.json, json.dumps(report.to_json(), indent=2) + "\n")
