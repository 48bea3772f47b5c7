"""Running a bundle from Python, over the same C interface that a device's application uses."""

from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session, load

__all__ = ["Model", "Session", "load"]
