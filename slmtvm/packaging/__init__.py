"""From a bundle to what is put on devices: one file for each format.

Every format is a function of a bundle and a target; equal input gives equal bytes, wherever.
"""

from slmtvm.packaging.options import Options
from slmtvm.packaging.packaging import FORMATS, package

__all__ = ["FORMATS", "Options", "package"]
