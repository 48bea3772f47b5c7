"""A session: the context of one conversation with a compiled model."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slmtvm.bundle.read import Bundle
from slmtvm.errors import BundleError, DeviceError
from slmtvm.runtime.constraint import Constraint
from slmtvm.runtime.interface import TEXT_IS_OVER
from slmtvm.runtime.model import Model
from slmtvm.runtime.sampling import Choosing, int32

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from slmtvm.text.constraint import CompiledConstraint

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
Mask = Sequence[int] | npt.NDArray[Any]  # (n,): not 0 where the token is visible
FloatArray = npt.NDArray[np.float32]


def load(
    path: str | Path,
    *,
    threads: int = 1,
    cores: str | None = None,
    target: str | None = None,
    check: bool = True,
    all_threads: bool = False,
    pub: str | Path | Sequence[str | Path] | None = None,
    least_counter: int = 0,
    weights_key: str | bytes | None = None,
) -> Session:
    """Open the bundle ``path`` and start a session; see ``Model`` for the arguments and errors."""
    model = Model(
        path,
        threads=threads,
        cores=cores,
        target=target,
        check=check,
        all_threads=all_threads,
        pub=pub,
        least_counter=least_counter,
        weights_key=weights_key,
    )
    return Session(model, owns_model=True)


class Session:
    """Tokens in, logits out; ``close`` it, or use it in a ``with`` statement.

    A call may take a mask (n,), which says of each token whether it is visible (not 0). Which masks
    a bundle takes, and what hidden tokens are to it, is ``info["mask"]``: "keys", they are keys
    that nobody attends to, and their positions count; "skip", they are left out; "none", it takes
    none but an encoder's visible tokens followed by hidden ones. Results have zeros in their rows.

    Several sessions may share a ``Model`` and be used from different threads; one session is used
    by one thread at a time.
    """

    def __init__(self, model: Model, *, owns_model: bool = False) -> None:
        """A new, empty session of ``model``; if it ``owns_model``, closing it closes the model."""
        self.model = model
        self._owns_model = owns_model
        self._handle = ctypes.c_void_p()
        self._call = model.library.call
        try:
            self._call("slm_session_new", model.handle, ctypes.byref(self._handle))
        except DeviceError:
            if owns_model:
                model.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; the session cannot be used any more. Closing twice is allowed."""
        if self._handle:
            self._call("slm_session_free", self._handle)
            self._handle = ctypes.c_void_p()
            if self._owns_model:
                self.model.close()

    @property
    def info(self) -> dict[str, Any]:
        """What the library holds: target, kind, context, vocab_size, output_size, memory, ..."""
        return self.model.info

    @property
    def how(self) -> dict[str, Any]:
        """How it computes: threads, of how many asked for, on which cores, and why as many."""
        return self.model.how

    @property
    def bundle(self) -> Bundle:
        """The bundle that the session runs."""
        return self.model.bundle

    def use_exits(self, use: bool) -> None:
        """Whether ``eval`` of one token may end at one of ``info["exits"]``, as it does at first.

        A bundle has exits where it was compiled with some; others do the same either way.
        """
        self._call("slm_use_exits", self._handle, int(use))

    @property
    def exit_taken(self) -> int:
        """At which exit the last token ended, from 1 on; 0: behind all layers."""
        return self._call("slm_exit_taken", self._handle)

    @property
    def position(self) -> int:
        """Tokens in the context so far."""
        return self._call("slm_position", self._handle)

    def seek(self, position: int) -> None:
        """Forget all tokens from ``position`` on; DeviceError where the context is shorter.

        Where layers keep a window of positions (``info["kv_window"]`` is not None) and the context
        has outgrown its ``positions``, it goes back by ``seek_back`` tokens or to 0: DeviceError
        further.
        """
        self._call("slm_seek", self._handle, int32(position, "position"))

    def reset(self) -> None:
        """Forget all tokens."""
        self.seek(0)

    def eval(self, tokens: Tokens, mask: Mask | None = None) -> FloatArray:
        """Append ``tokens`` (n,), n >= 1, to the context; the logits (vocab,) after the last one.

        Raises DeviceError where a token id is out of range or the context is full, and where
        ``mask`` hides the last token, or tokens that this bundle cannot do without.
        """
        ids = _token_ids(tokens)
        logits = np.empty(self.info["output_size"], np.float32)
        self._run("slm_eval", ids, mask, logits.ctypes.data)
        return logits

    @staticmethod
    def eval_batch(sessions: Sequence[Session], tokens: Tokens) -> FloatArray:
        """Append tokens[i] to the context of sessions[i]; the logits (n, vocab) after each.

        tokens: (n,), n >= 1, of as many different sessions of one model. The weights are read once
        for several sessions, see ``info["batches"]``; each row has the bits that ``eval`` gives.
        Raises DeviceError where ``eval`` would, and for sessions of different models or one that is
        named twice; no session has changed then.
        """
        ids, handles = _token_ids(tokens), _handles(sessions)
        if ids.size != len(sessions):
            raise DeviceError(f"{ids.size} tokens for {len(sessions)} sessions: one for each")
        if not len(sessions):
            raise DeviceError("no sessions given")
        first = sessions[0]
        logits = np.empty((ids.size, first.info["output_size"]), np.float32)
        first._call("slm_eval_batch", handles, ids.ctypes.data, ids.size, logits.ctypes.data)
        return logits

    def eval_all(self, tokens: Tokens, mask: Mask | None = None) -> FloatArray:
        """Like ``eval``, with the logits (n, vocab) after each token.

        Where ``mask`` hides the last token, there are no logits to ``sample`` from afterwards.
        """
        return self._rows("slm_eval_all", tokens, mask)

    def encode(
        self, tokens: Tokens, mask: Mask | None = None, segments: Tokens | None = None
    ) -> FloatArray:
        """Run an encoder over ``tokens`` (n,), n >= 1; its first output.

        That is a row for each token (n, features), or where it is pooled (features,). An
        encoder-decoder reads its source so: its hidden states (n, hidden_size); a new context
        begins, which attends to them. ``segments`` (n,): of which text each token is, as
        token_type_ids have it; of the first, 0, where not given. Raises DeviceError for one that is
        not below ``info["segments"]``, which is 0 for a model that tells no texts apart.
        """
        if self.info["kind"] != "encoder":
            return self._rows("slm_encode", tokens, mask)
        ids = self._encode(tokens, mask, segments)
        return self._output(0, ids.size)

    def outputs(
        self, tokens: Tokens, mask: Mask | None = None, segments: Tokens | None = None
    ) -> dict[str, FloatArray]:
        """Run the model over ``tokens`` (n,), n >= 1: all its outputs, by their names in the file.

        Of an encoder each is (n, features), or where it is pooled (features,). A decoder appends
        ``tokens`` to its context; each of its outputs is the row (features,) after the last one.
        ``segments`` as for ``encode``.
        """
        count = 0
        if self.info["kind"] == "encoder" or segments is not None:
            count = self._encode(tokens, mask, segments).size
        else:
            self._run("slm_eval", _token_ids(tokens), mask, None)
        named = enumerate(self.info["outputs"])
        return {output["name"]: self._output(index, count) for index, output in named}

    def _encode(
        self, tokens: Tokens, mask: Mask | None, segments: Tokens | None
    ) -> npt.NDArray[np.int32]:
        """Encode, and leave the outputs in the session; the token ids."""
        ids = _token_ids(tokens)
        if segments is None:
            self._run("slm_encode", ids, mask, None)
            return ids
        kinds = _token_ids(segments)
        if kinds.size != ids.size:
            raise DeviceError(f"{kinds.size} segments for {ids.size} tokens")
        visible = None if mask is None else _visible(mask, ids.size)
        self._call(
            "slm_encode_segments", self._handle, ids.ctypes.data, kinds.ctypes.data,
            None if visible is None else visible.ctypes.data, ids.size, None,
        )  # fmt: skip
        return ids

    def _output(self, index: int, count: int) -> FloatArray:
        """An output of the last call: of an encoder's ``count`` tokens, or 0 for a decoder's."""
        output = self.info["outputs"][index]
        shape = (
            (output["features"],) if output["pooled"] or not count else (count, output["features"])
        )
        values = np.empty(shape, np.float32)
        self._call("slm_output_get", self._handle, index, values.ctypes.data)
        return values

    def constraint(self, given: str | Path | CompiledConstraint) -> Constraint:
        """Open a constraint: its file, or what ``slmtvm.constrain`` returned.

        It serves all sessions of the model, and is to be closed before it. Raises BundleError where
        the file cannot be read, ConstraintError where it is damaged or of another vocabulary.
        """
        return Constraint(self.model.library, given)

    def sample(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        min_p: float = 0.0,
        repetition_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
        written: int = 0,
        constraint: Constraint | None = None,
        state: int = 0,
        most: int = 0,
    ) -> int:
        """Choose the token that follows the context, without appending it.

        Zero turns each part off; ``temperature`` 0 takes the likeliest token. The same seed,
        context and parameters give the same token. ``logit_bias`` (token: what is added to its
        logit); presence and frequency penalties are of tokens from position ``written`` on.
        ``constraint`` and the ``state`` it is in; ``most``: tokens that may come, so that the text
        becomes whole in so many (0: any number). Raises DeviceError before the first ``eval``,
        ConstraintError where nothing may follow.
        """
        sampling = Choosing(
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias or {}, seed, written,
        ).struct()  # fmt: skip
        if constraint is not None:
            sampling.constraint = constraint.handle
            sampling.state, sampling.most = int32(state, "state"), int32(most, "most")
        return self._call("slm_sample", self._handle, ctypes.byref(sampling))

    def generate(
        self,
        prompt: Tokens,
        max_tokens: int = 64,
        *,
        mask: Mask | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 0.0,
        min_p: float = 0.0,
        repetition_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> Iterator[int]:
        """Append ``prompt`` to the context, then yield up to ``max_tokens`` token ids one by one.

        ``mask`` is the prompt's; what is generated is visible. Ends before a token of ``stop`` and
        when the context is full. Without ``seed`` every call draws differently. The other
        parameters are those of ``sample``; the penalties of presence and frequency are of what is
        generated. The prompt is evaluated at once; a token is appended when the next one is asked
        for, so the last one is not. With a ``constraint`` the text ends when it is whole, and
        becomes so within ``max_tokens`` and the context; ConstraintError where it cannot.
        """
        ids = _token_ids(prompt)
        chosen = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        sampling = Choosing(
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias or {}, chosen,
        ).struct()  # fmt: skip
        self._run("slm_eval", ids, mask, None)
        sampling.written = self.position
        if constraint is not None:
            sampling.constraint = constraint.handle

        def tokens() -> Iterator[int]:
            # A token of a small model takes a tenth of a millisecond: nothing is made anew for it.
            call, context = self._call, self.info["context"]
            wanted, token = ctypes.byref(sampling), ctypes.c_int32()
            at = ctypes.addressof(token)
            for count in range(max_tokens):
                if constraint is not None:
                    # The last token needs no place in the context.
                    sampling.most = min(max_tokens - count, context - self.position + 1)
                token.value = chosen = call("slm_sample", self._handle, wanted)
                if chosen in stop:
                    return
                over = False
                if constraint is not None:
                    sampling.state = state = constraint.next(sampling.state, chosen)
                    if state == TEXT_IS_OVER:
                        return
                    over = constraint.is_over(state)
                yield chosen
                if over or count + 1 == max_tokens or self.position == context:
                    return
                call("slm_eval", self._handle, at, 1, None)

        return tokens()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer; raises BundleError where it has none.

        It neither pads nor cuts a text, whatever its file says: that is for batches in training,
        and would have a model continue another prompt.
        """
        return tokenizer_of(self.bundle)

    def _run(
        self, function: str, ids: npt.NDArray[np.int32], mask: Mask | None, output: int | None
    ) -> None:
        if mask is None:
            self._call(function, self._handle, ids.ctypes.data, ids.size, output)
            return
        visible = _visible(mask, ids.size)
        self._call(
            f"{function}_masked", self._handle, ids.ctypes.data, visible.ctypes.data, ids.size,
            output,
        )  # fmt: skip

    def _rows(self, function: str, tokens: Tokens, mask: Mask | None) -> FloatArray:
        ids = _token_ids(tokens)
        reads_source = function == "slm_encode" and self.info["kind"] == "encoder-decoder"
        context = self.info["source_context" if reads_source else "context"]
        if ids.size > context:
            # Refused before so much memory is asked for; the library would say the same.
            raise DeviceError(f"{ids.size} tokens do not fit the context of {context}")
        width = self.info["hidden_size" if reads_source else "output_size"]
        rows = np.empty((ids.size, width), np.float32)
        self._run(function, ids, mask, rows.ctypes.data)
        return rows


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """As ``Session.tokenizer``, of a bundle that need not run here."""
    from tokenizers import Tokenizer

    path = bundle.tokenizer()
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise BundleError(f"not a tokenizer: {error}", where=f"{path}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _token_ids(tokens: Tokens) -> npt.NDArray[np.int32]:
    array = np.asarray(tokens)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DeviceError(
            f"tokens must be a list or (n,) array of whole numbers, not {array.dtype} {array.shape}"
        )
    bounds = np.iinfo(np.int32)
    if array.size and not (bounds.min <= int(array.min()) and int(array.max()) <= bounds.max):
        raise DeviceError("a token id is out of range")
    return np.ascontiguousarray(array, np.int32)


def _handles(sessions: Sequence[Session]) -> ctypes.Array[ctypes.c_void_p]:
    """Their handles for C; DeviceError where they are of models of different libraries."""
    for index, session in enumerate(sessions):
        # Their structs could not be told apart by one library from its own.
        if session.model is not sessions[0].model:
            raise DeviceError(f"session {index} is of another model than session 0")
    return (ctypes.c_void_p * len(sessions))(*(session._handle for session in sessions))


def _visible(mask: Mask, count: int) -> npt.NDArray[np.uint8]:
    array = np.asarray(mask)
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise DeviceError(
            f"mask must be a list or ({count},) array of numbers, one for each token, not "
            f"{array.dtype} {array.shape}"
        )
    return (array != 0).astype(np.uint8)
