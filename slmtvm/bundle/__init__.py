"""The artifact: a folder with libraries, weights, a manifest and perhaps a tokenizer.

Reading needs no compiler; ``slmtvm.bundle.write`` is imported by what compiles.
"""

from slmtvm.bundle.read import Bundle

__all__ = ["Bundle"]
