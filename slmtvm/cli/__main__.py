"""``python -m slmtvm.cli``."""

import sys

from slmtvm.cli.main import main

sys.exit(main())
