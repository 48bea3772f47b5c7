"""The errors a user can meet; every message says where, what was found and what to do."""

from __future__ import annotations


class SlmError(Exception):
    """Base of all errors that slmtvm raises on purpose.

    Parameters
    ----------
    message: what was found, what is supported and what to do.
    where: the file, and where known the node or field, the message is about.
    """

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message)


class InvalidModelError(SlmError):
    """The ONNX file is damaged, contradicts itself or breaks a limit."""


class UnsupportedOpError(SlmError):
    """The ONNX file is valid but holds something that cannot be compiled."""


class InternalError(UnsupportedOpError):
    """A fault of slmtvm's own met an ONNX file; the exception that shows it is its cause."""


class UnsupportedTokenizerError(SlmError):
    """A tokenizer.json asks for something that cannot be compiled; Python's tokenizers reads it."""


class ConstraintError(SlmError):
    """A schema, regex or choices cannot be compiled to a constraint, or one cannot be followed."""


class AccuracyError(SlmError):
    """What was compiled gives other results than onnxruntime on the same file."""


class TargetError(SlmError):
    """A target is unknown, badly described, or cannot run what is asked of it."""


class BundleError(SlmError):
    """A bundle is missing, damaged, or made for something else."""


class SignatureError(BundleError):
    """A bundle or package is not signed by a key that is trusted, is too old, or was changed."""


class AuditError(SlmError):
    """A log of ``slm-serve --audit`` was changed, or is none."""


class DeviceError(SlmError):
    """The compiled model reported an error while it ran."""


class RpcError(SlmError):
    """A tracker or a runner cannot be reached, refuses, or is lost; another device may serve."""
