"""A compiled language model: its library and weights are in this package.

    with load() as session:
        logits = session.eval([1, 2, 3])
        print(list(session.generate(16)))

Nothing is needed besides Python; where numpy is installed, numbers come as its arrays, else as
``array.array``. Token ids go in; with ``tokenizers`` installed, ``tokenizer()`` makes them of text.
"""

from __future__ import annotations

import array
import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment,unused-ignore]

BUNDLE = Path(__file__).parent / "bundle"
SELFTEST = Path(__file__).parent / "bin" / "slm-selftest"
__all__ = ["BUNDLE", "SELFTEST", "ModelError", "Session", "load", "tokenizer"]


class ModelError(Exception):
    """What the model's library said went wrong."""


class _Options(ctypes.Structure):  # slm_options of include/slm.h
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("cores", ctypes.c_char_p),
        ("public_keys", ctypes.c_char_p),
        ("least_counter", ctypes.c_uint64),
        ("weights_key", ctypes.c_char_p),
    )


class _Sampling(ctypes.Structure):  # slm_sampling
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("seed", ctypes.c_uint64),
    )


class _Output(ctypes.Structure):  # slm_output
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("features", ctypes.c_int32),
        ("pooled", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )


def _library() -> Any:
    (path,) = (BUNDLE / "lib").glob("*.so")
    library = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    library.slm_info.restype = library.slm_last_error.restype = ctypes.c_char_p
    for name, arguments in {
        "slm_open": (ctypes.c_char_p, pointer, pointer),
        "slm_close": (pointer,),
        "slm_session_new": (pointer, pointer),
        "slm_session_free": (pointer,),
        "slm_eval": (pointer, pointer, ctypes.c_size_t, pointer),
        "slm_eval_all": (pointer, pointer, ctypes.c_size_t, pointer),
        "slm_encode": (pointer, pointer, ctypes.c_size_t, pointer),
        "slm_output_info": (ctypes.c_int32, pointer),
        "slm_output_get": (pointer, ctypes.c_int32, pointer),
        "slm_position": (pointer,),
        "slm_seek": (pointer, ctypes.c_int32),
        "slm_sample": (pointer, pointer),
    }.items():
        getattr(library, name).argtypes = arguments
    return library


class Session:
    """One conversation with the model; use it in a ``with`` statement, or ``close`` it."""

    def __init__(
        self,
        threads: int = 1,
        public_keys: str | None = None,
        least_counter: int = 0,
        weights_key: bytes | None = None,
    ) -> None:
        """Open the model. ``threads``: the most that compute; 0 is one for each core.

        ``public_keys``: Ed25519 keys as PEM text, by one of which the bundle must be signed, with
        a counter of at least ``least_counter``. ``weights_key``: the 32 bytes of the key of
        encrypted weights, which are then locked in memory. Raises ModelError.
        """
        self._lib = _library()
        self.info: dict[str, Any] = json.loads(self._lib.slm_info().decode())
        self._model, self._session = ctypes.c_void_p(), ctypes.c_void_p()
        keys = None if public_keys is None else public_keys.encode()
        if weights_key is not None and len(weights_key) != 32:
            raise ModelError(f"weights_key has {len(weights_key)} bytes, must have 32")
        options = _Options(
            ctypes.sizeof(_Options), threads, 0, None, keys, least_counter, weights_key
        )
        self._call("slm_open", str(BUNDLE).encode(), ctypes.byref(options),
                   ctypes.byref(self._model))  # fmt: skip
        try:
            self._call("slm_session_new", self._model, ctypes.byref(self._session))
        except ModelError:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back. Closing twice is allowed."""
        if self._session:
            self._call("slm_session_free", self._session)
            self._session = ctypes.c_void_p()
        if self._model:
            self._call("slm_close", self._model)
            self._model = ctypes.c_void_p()

    @property
    def position(self) -> int:
        """Tokens in the context so far."""
        return self._call("slm_position", self._session)

    def seek(self, position: int) -> None:
        """Forget all tokens from ``position`` on."""
        self._call("slm_seek", self._session, position)

    def eval(self, tokens: Sequence[int]) -> Any:
        """Append ``tokens`` to a decoder's context: float32 (vocabulary,) after the last one."""
        values = self._floats(self._lib.slm_output_size())
        self._run("slm_eval", tokens, values)
        return _shaped(values, 0)

    def eval_all(self, tokens: Sequence[int]) -> Any:
        """The same, after each token: float32 (n, vocabulary), or a list of rows without numpy."""
        width = self._lib.slm_output_size()
        values = self._floats(len(tokens) * width)
        self._run("slm_eval_all", tokens, values)
        return _shaped(values, width)

    def outputs(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Run an encoder: all its outputs by name, (n, features), or (features,) if pooled."""
        self._run("slm_encode", tokens, None)
        found: dict[str, Any] = {}
        for index in range(self._lib.slm_output_count()):
            output = _Output(ctypes.sizeof(_Output))
            self._call("slm_output_info", index, ctypes.byref(output))
            count = output.features * (1 if output.pooled else len(tokens))
            values = self._floats(count)
            self._call("slm_output_get", self._session, index, values)
            found[output.name.decode()] = _shaped(values, 0 if output.pooled else output.features)
        return found

    def encode_source(self, tokens: Sequence[int]) -> None:
        """Have an encoder-decoder read its source; a new context begins."""
        self._run("slm_encode", tokens, None)

    def generate(
        self,
        count: int,
        temperature: float = 0,
        top_k: int = 0,
        top_p: float = 0,
        min_p: float = 0,
        repetition_penalty: float = 0,
        seed: int = 0,
        end: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Up to ``count`` tokens that follow; one of ``end``, by default the model's, ends it."""
        ends = self.info.get("end", []) if end is None else end
        sampling = _Sampling(ctypes.sizeof(_Sampling), temperature, top_k, top_p, min_p,
                             repetition_penalty, seed)  # fmt: skip
        for left in range(count, 0, -1):
            token = self._call("slm_sample", self._session, ctypes.byref(sampling))
            if token in ends:
                return
            yield token
            if left == 1 or self.position == self._lib.slm_context_size():
                return
            self._run("slm_eval", [token], None)

    def _run(self, name: str, tokens: Sequence[int], values: Any) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        self._call(name, self._session, ids, len(tokens), values)

    def _call(self, name: str, *arguments: Any) -> int:
        result: int = getattr(self._lib, name)(*arguments)
        if result < 0:
            raise ModelError(self._lib.slm_last_error().decode(errors="replace"))
        return result

    @staticmethod
    def _floats(count: int) -> Any:
        return (ctypes.c_float * count)()


def load(
    threads: int = 1,
    public_keys: str | None = None,
    least_counter: int = 0,
    weights_key: bytes | None = None,
) -> Session:
    """``Session`` with these arguments."""
    return Session(threads, public_keys, least_counter, weights_key)


def tokenizer() -> Any:
    """The model's tokenizer, of the package ``tokenizers``, which must be installed."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(BUNDLE / "tokenizer.json"))


def _shaped(values: Any, width: int) -> Any:
    """``values`` as a numpy array, (n, ``width``) where that is not 0; rows of arrays without."""
    if numpy is not None:
        result = numpy.ctypeslib.as_array(values).copy()
        return result.reshape(-1, width) if width else result
    if not width:
        return array.array("f", values)
    rows: list[Any] = [
        array.array("f", values[i : i + width]) for i in range(0, len(values), width)
    ]
    return rows
