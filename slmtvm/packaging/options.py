"""What the formats need to know besides the bundle."""

from __future__ import annotations

from dataclasses import dataclass

from slmtvm.bundle.signature import Signer


@dataclass(frozen=True)
class Options:
    """``signer`` signs what a format has to sign itself; ``maintainer``: "Name <mail>"."""

    signer: Signer | None = None
    maintainer: str | None = None
