"""Running a bundle from Python, over the same C interface that a device's application uses."""

from slmtvm.runtime.batch import generate_batch
from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session, load

__all__ = ["Model", "Session", "generate_batch", "load"]
