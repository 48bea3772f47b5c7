"""``slmtvm`` as the readers of documents type it, with the kernels that other tests compiled.

    python -m tests.docs.command FOLDER ARGUMENTS

FOLDER: where the objects of kernels are kept, see tests/kept_objects.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from slmtvm.cli.__main__ import command

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    if sys.argv[1:2] == ["compile"]:  # the others compile little, or in processes of their own
        from tests.kept_objects import keep_in

        keep_in(folder)
    sys.exit(command())
