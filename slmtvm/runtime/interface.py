"""slm.h in ctypes: the functions of a library, with their errors as exceptions."""

from __future__ import annotations

import _ctypes
import ctypes
import tempfile
from ctypes import (
    POINTER,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from slmtvm.errors import BundleError, ConstraintError, DeviceError, SignatureError, SlmError

ABI_VERSION = 1
SKIP_CHECKSUM, PROFILE, ALL_THREADS, MAY_SWAP = 1, 2, 4, 8  # flags of slm_open
ERR_ARGUMENT, ERR_FILE, ERR_WEIGHTS, ERR_SIGNATURE, ERR_TOKENIZER = -1, -5, -6, -12, -13
ERR_CONSTRAINT, TEXT_IS_OVER = -16, -1000
_ERRORS = {
    ERR_FILE: BundleError, ERR_WEIGHTS: BundleError, ERR_TOKENIZER: BundleError,
    ERR_SIGNATURE: SignatureError, ERR_CONSTRAINT: ConstraintError,
}  # fmt: skip


class Options(ctypes.Structure):
    """slm_options."""

    _fields_ = (
        ("size", c_uint32),
        ("threads", c_int32),
        ("flags", c_uint32),
        ("cores", c_char_p),
        ("public_keys", c_char_p),
        ("least_counter", c_uint64),
        ("weights_key", c_char_p),
    )


class Bias(ctypes.Structure):
    """slm_bias."""

    _fields_ = (("token", c_int32), ("bias", c_float))


class Sampling(ctypes.Structure):
    """slm_sampling; ``kept`` is what it points to."""

    kept: object = None

    _fields_ = (
        ("size", c_uint32),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("seed", c_uint64),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("written", c_int32),
        ("bias_count", c_int32),
        ("biases", c_void_p),
        ("constraint", c_void_p),
        ("state", c_int32),
        ("most", c_int32),
    )


class OutputInfo(ctypes.Structure):
    """slm_output."""

    _fields_ = (
        ("size", c_uint32),
        ("features", c_int32),
        ("pooled", c_int32),
        ("name", c_char_p),
    )


class KernelTime(ctypes.Structure):
    """slm_kernel_time."""

    _fields_ = (("calls", c_uint64), ("nanoseconds", c_uint64), ("own_nanoseconds", c_uint64))


class TextState(ctypes.Structure):
    """slm_text_state."""

    _fields_ = (
        ("token", c_uint64),
        ("written", c_uint32),
        ("held", c_uint32),
        ("bytes", c_uint8 * 4),
        ("started", c_uint32),
        ("stripped", c_uint32),
    )


_TEXT, _SPANS, _WORK = c_char_p, c_void_p, c_void_p
_TOKENS, _MASK, _FLOATS = c_void_p, c_void_p, c_void_p
PROTOTYPES = {
    "slm_abi_version": (c_uint32, ()),
    "slm_info": (c_char_p, ()),
    "slm_output_size": (c_int32, ()),
    "slm_context_size": (c_int32, ()),
    "slm_output_count": (c_int32, ()),
    "slm_output_info": (c_int32, (c_int32, POINTER(OutputInfo))),
    "slm_output_get": (c_int32, (c_void_p, c_int32, _FLOATS)),
    "slm_last_error": (c_char_p, ()),
    "slm_open": (c_int32, (c_char_p, POINTER(Options), POINTER(c_void_p))),
    "slm_model_info": (c_char_p, (c_void_p,)),
    "slm_close": (c_int32, (c_void_p,)),
    "slm_session_bytes": (c_int64, (c_void_p,)),
    "slm_session_new": (c_int32, (c_void_p, POINTER(c_void_p))),
    "slm_session_free": (c_int32, (c_void_p,)),
    "slm_eval": (c_int32, (c_void_p, _TOKENS, c_size_t, _FLOATS)),
    "slm_eval_all": (c_int32, (c_void_p, _TOKENS, c_size_t, _FLOATS)),
    "slm_eval_batch": (c_int32, (POINTER(c_void_p), _TOKENS, c_size_t, _FLOATS)),
    "slm_encode": (c_int32, (c_void_p, _TOKENS, c_size_t, _FLOATS)),
    "slm_eval_masked": (c_int32, (c_void_p, _TOKENS, _MASK, c_size_t, _FLOATS)),
    "slm_eval_all_masked": (c_int32, (c_void_p, _TOKENS, _MASK, c_size_t, _FLOATS)),
    "slm_encode_masked": (c_int32, (c_void_p, _TOKENS, _MASK, c_size_t, _FLOATS)),
    "slm_encode_segments": (c_int32, (c_void_p, _TOKENS, _TOKENS, _MASK, c_size_t, _FLOATS)),
    "slm_use_exits": (c_int32, (c_void_p, c_int32)),
    "slm_exit_taken": (c_int32, (c_void_p,)),
    "slm_position": (c_int32, (c_void_p,)),
    "slm_seek": (c_int32, (c_void_p, c_int32)),
    "slm_profile": (c_int32, (c_void_p, POINTER(KernelTime), c_size_t)),
    "slm_tokenizer_open": (c_int32, (c_char_p, POINTER(c_void_p))),
    "slm_tokenizer_close": (c_int32, (c_void_p,)),
    "slm_tokenize_bytes": (c_int64, (c_void_p, c_size_t)),
    "slm_tokenize": (
        c_int32,
        (c_void_p, _TEXT, c_size_t, c_uint32, _TOKENS, _SPANS, c_size_t, _WORK, c_size_t),
    ),
    "slm_tokenize_pair": (
        c_int32,
        (
            c_void_p,
            _TEXT,
            c_size_t,
            _TEXT,
            c_size_t,
            c_uint32,
            _TOKENS,
            c_void_p,
            _SPANS,
            c_size_t,
            _WORK,
            c_size_t,
        ),
    ),
    "slm_detokenize": (
        c_int32,
        (c_void_p, POINTER(TextState), _TOKENS, c_size_t, c_uint32, c_void_p, c_size_t),
    ),
    "slm_token_text": (c_int32, (c_void_p, c_int32, c_void_p, c_size_t)),
    "slm_token_find": (c_int32, (c_void_p, _TEXT, c_size_t)),
    "slm_token_count": (c_int32, (c_void_p,)),
    "slm_sample": (c_int32, (c_void_p, POINTER(Sampling))),
    "slm_constraint_open": (c_int32, (c_char_p, POINTER(c_void_p))),
    "slm_constraint_close": (c_int32, (c_void_p,)),
    "slm_constraint_next": (c_int32, (c_void_p, c_int32, c_int32)),
    "slm_constraint_left": (c_int32, (c_void_p, c_int32)),
    "slm_constraint_tokens": (c_int32, (c_void_p,)),
}


class Library:
    """A loaded library; ``call`` runs one of its functions."""

    def __init__(self, path: Path) -> None:
        """Load ``path``; raises BundleError where it is no library of this interface."""
        try:
            self._library: ctypes.CDLL | None = _load_afresh(path)
            for name, (result, arguments) in PROTOTYPES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise BundleError(f"cannot be loaded: {error}", where=f"{path}") from error
        version = self.call("slm_abi_version")
        if version != ABI_VERSION:
            raise BundleError(
                f"interface version {version}, this slmtvm uses {ABI_VERSION}; "
                "compile the model again",
                where=f"{path}",
            )

    def call(self, name: str, *arguments: object) -> int:
        """The function's result; raises an SlmError with its message if it is negative."""
        library = self._loaded()
        result: int = getattr(library, name)(*arguments)
        if result < 0 and result != TEXT_IS_OVER:
            message = library.slm_last_error().decode(errors="replace")
            kind: type[SlmError] = _ERRORS.get(result, DeviceError)
            raise kind(message)
        return result

    def info(self) -> str:
        """slm_info(): JSON text."""
        text: bytes = self._loaded().slm_info()
        return text.decode()

    def model_info(self, model: c_void_p) -> str:
        """slm_model_info(): JSON text."""
        text: bytes = self._loaded().slm_model_info(model)
        return text.decode()

    def close(self) -> None:
        """Unload the library; whatever was made by it must be gone."""
        if self._library is not None:
            _ctypes.dlclose(self._library._handle)
            self._library = None

    def _loaded(self) -> ctypes.CDLL:
        if self._library is None:
            raise DeviceError("the model is closed")
        return self._library


def _load_afresh(path: Path) -> ctypes.CDLL:
    """Load the file that lies at ``path`` now.

    The C library remembers what it loaded by name: after a bundle was replaced while its old
    library is in use, the old one would come back. A name that nobody used before prevents it.
    """
    with tempfile.TemporaryDirectory(prefix="slm-") as folder:
        unique = Path(folder) / path.name
        unique.symlink_to(path.resolve())
        return ctypes.CDLL(str(unique))
