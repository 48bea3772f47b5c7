"""The oracle: onnxruntime on the user's own ONNX file, its graph left as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import load_external_data_for_model

from slmtvm.embedding_modules import EMBEDDING, ROWS, embedding_modules
from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer.encoder_decoder import encoder_file
from slmtvm.importer.freeze.roles import pair_values
from slmtvm.importer.read.hub import follow_links
from slmtvm.verify.cache import cache_sizes, shared_caches
from slmtvm.verify.embedding import embed
from slmtvm.verify.exact_sums import open_exact
from slmtvm.verify.widening import computes_in, in_float32

_DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_PAST_PREFIX = "past"  # past_key_values.0.key, past_0, ...
_CACHE_RANK = 4  # (batch, heads, length, head_dim)
_SOURCE_STATES = "encoder_hidden_states"
_IDS, _MASK = "input_ids", "attention_mask"
_SEGMENTS = "token_type_ids"
_PAIRS, _PAIRS_RANK = ("mask", "bias"), 4  # inputs that say what each token sees, in a decoder
_LOGITS, _HIDDEN = "logits", "last_hidden_state"

_Tokens = Sequence[int] | np.ndarray
_Values = dict[str, np.ndarray]
Change = Callable[[onnx.ModelProto], onnx.ModelProto]


class Reference:
    """A model's ONNX file under onnxruntime, on the CPU, without optimisation.

    One that computes in bfloat16, for which there are no kernels, is given the same numbers in
    float32. What onnxruntime computes wrongly on this machine is computed by other kernels of it.

    A decoder that reads an encoder's hidden states has the encoder's file beside it.

    Raises InvalidModelError where there is no such file or it is damaged, UnsupportedOpError where
    onnxruntime lacks an operator of it, or an input is none of those that language models have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int = 1,
        optimize: bool = False,
        encoder: str | Path | None = None,
        change: Change | None = None,
    ) -> None:
        """``optimize``: let onnxruntime rewrite the graph: for its speed, not its numbers.

        ``encoder``: the encoder's file; the one beside ``path`` where None. ``change``: takes the
        file's model, numbers and all, and gives the one to run in its place.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise InvalidModelError("no such file", where=str(path))
        self._threads = threads
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        )
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the cores from the bundle's own.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what fails is raised too
        try:
            model = onnx.load(path, load_external_data=False)
            folder = follow_links(model, self.path)
            self._cache_sizes = cache_sizes(model.graph)
            self._shared = shared_caches(model.graph)
            brain = computes_in(onnx.TensorProto.BFLOAT16, model)
            if change or brain:
                load_external_data_for_model(model, str(folder))
            model = in_float32(model) if brain else model
            model = change(model) if change else model
            changed = bool(change or brain or folder != self.path.parent)
            exact = open_exact(model, self.path, options, folder=folder, changed=changed)
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise _refusal(path, error) from error
        self._session = exact.session
        self.doubts = exact.doubts  # why its numbers may be wrong, a sentence each
        self._output = ""
        self.choose_output()
        self._encoder: Reference | None = None
        if any(given.name == _SOURCE_STATES for given in self._session.get_inputs()):
            file = encoder_file(self.path, None if encoder is None else Path(encoder))
            self._encoder = Reference(file, threads=threads, optimize=optimize, change=change)
            self.doubts = tuple(dict.fromkeys((*self.doubts, *self._encoder.doubts)))

    def variant(self, *, optimize: bool = False, change: Change | None = None) -> Reference:
        """Another one of the same file, for the same output; arguments as when one is made."""
        encoder = None if self._encoder is None else self._encoder.path
        other = Reference(
            self.path,
            threads=self._threads,
            optimize=optimize,
            encoder=encoder,
            change=change,
        )
        other.choose_output(self._output)
        return other

    @property
    def size(self) -> int:
        """Bytes of the file, or of both files."""
        return file_bytes(self.path) + (self._encoder.size if self._encoder else 0)

    def rows(
        self,
        tokens: _Tokens,
        source: _Tokens | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """The file's output for tokens (n,) as one batch without a cache: float32 (n, features).

        Logits for a decoder, hidden states for an encoder. ``source`` (s,) is what an
        encoder-decoder reads first. ``mask``: 1 for visible tokens and 0 for hidden ones, those of
        the source where there is one; positions then count visible tokens, where they are an input.
        """
        count = len(tokens)
        if count < self.fixed_length:
            tokens, mask = self._padded(tokens, mask)
        rows = np.asarray(self.run(tokens, [self._output], source, mask)[0], np.float32)
        if rows.ndim != 3 or rows.shape[:2] != (1, len(tokens)):
            raise UnsupportedOpError(
                f"output {self._output!r} has shape {rows.shape} for {len(tokens)} tokens; "
                "to compare, it must be (batch, sequence, features)",
                where=str(self.path),
            )
        first: np.ndarray = rows[0, :count]
        return first

    @property
    def fixed_length(self) -> int:
        """How many tokens the file takes, neither more nor fewer; 0 where it takes any number."""
        shapes = [given.shape for given in self._session.get_inputs() if given.name == _IDS]
        length = shapes[0][-1] if shapes and shapes[0] else None
        return length if isinstance(length, int) else 0

    @property
    def takes_mask(self) -> bool:
        """Whether tokens of a sequence can be hidden from the others."""
        return any(given.name == _MASK for given in self._session.get_inputs())

    def _padded(self, tokens: _Tokens, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As many tokens as the file takes, those that were added hidden behind the others."""
        more = self.fixed_length - len(tokens)
        seen = np.ones(len(tokens), np.int64) if mask is None else np.asarray(mask, np.int64)
        return np.pad(np.asarray(tokens, np.int64), (0, more)), np.pad(seen, (0, more))

    def main(self, tokens: _Tokens) -> np.ndarray:
        """The file's main output for tokens (n,) as it is, without its axis of the batch."""
        first: np.ndarray = self.run(tokens, [self._output])[0][0]
        return first

    def run(
        self,
        tokens: _Tokens,
        outputs: Sequence[str],
        source: _Tokens | None = None,
        mask: np.ndarray | None = None,
        segments: _Tokens | None = None,
    ) -> list[np.ndarray]:
        """Some of the file's outputs for tokens (n,) as one batch without a cache.

        EMBEDDING, where the file has no such output, is what the modules beside it make of rows.
        """
        if EMBEDDING in outputs and EMBEDDING not in self._names and self._rows_name:
            return self._with_embedding(tokens, outputs, source, mask, segments)
        feeds = self.feeds(tokens, source, mask)
        if segments is not None and _SEGMENTS in feeds:
            feeds[_SEGMENTS] = np.asarray(segments, feeds[_SEGMENTS].dtype)[None]
        try:
            if self._shared:
                return self._run_in_place(list(outputs), feeds)
            return [np.asarray(v) for v in self._session.run(list(outputs), feeds)]
        except SlmError:
            raise
        except Exception as error:
            raise _refusal(self.path, error) from error

    def _run_in_place(self, outputs: list[str], feeds: _Values) -> list[np.ndarray]:
        """Run a file whose attentions append to the very buffers that they are given."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if name not in self._shared:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
                continue
            present, positions = self._shared[name]
            shape = (*value.shape[:2], value.shape[2] or positions, value.shape[3])
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, value.dtype))
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(present, cache)
        for name in outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return [np.asarray(v) for v in binding.copy_outputs_to_cpu()[-len(outputs) :]]

    @property
    def _names(self) -> list[str]:
        return [output.name for output in self._session.get_outputs()]

    @property
    def _rows_name(self) -> str:
        """The output that the modules beside the file read, "" where there are none."""
        found = [name for name in ROWS if name in self._names]
        return found[0] if found and embedding_modules(self.path).compiled else ""

    def _with_embedding(
        self,
        tokens: _Tokens,
        outputs: Sequence[str],
        source: _Tokens | None,
        mask: np.ndarray | None,
        segments: _Tokens | None,
    ) -> list[np.ndarray]:
        names = [self._rows_name, *(name for name in outputs if name != EMBEDDING)]
        values = dict(zip(names, self.run(tokens, names, source, mask, segments), strict=True))
        visible = np.ones(len(tokens), bool) if mask is None else np.asarray(mask) != 0
        rows = np.asarray(values[self._rows_name], np.float32)[0]
        embedding = embed(embedding_modules(self.path), rows, visible)
        values[EMBEDDING] = embedding[None].astype(np.float32)
        return [values[name] for name in outputs]

    def feeds(
        self,
        tokens: _Tokens,
        source: _Tokens | None = None,
        mask: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The values of all inputs for tokens (n,), as onnxruntime takes them."""
        ids = np.asarray(tokens, np.int64)
        if source is None:
            values = _values(ids, mask)
        else:
            values = self._with_source(_values(ids, None), np.asarray(source, np.int64), mask)
        return {given.name: self._feed(given, values) for given in self._session.get_inputs()}

    def _with_source(
        self, values: dict[str, np.ndarray], source: np.ndarray, mask: np.ndarray | None
    ) -> _Values:
        """Where there is a source, inputs are the decoder's by name or by what else there is."""
        of_source = _values(source, mask)
        decoder = {f"decoder_{name}": value for name, value in values.items()}
        if self._encoder is None:
            return {**of_source, **decoder}
        hidden = self._encoder.rows(source, mask=mask)
        own = {_SOURCE_STATES: hidden, "encoder_attention_mask": of_source["attention_mask"]}
        return {**values, **decoder, **own}

    @property
    def is_decoder(self) -> bool:
        """Whether its output is logits."""
        return self._output == _LOGITS

    @property
    def output(self) -> str:
        """The output that is compared."""
        return self._output

    def choose_output(self, name: str | None = None) -> None:
        """Compare the output ``name``; else logits, hidden states, or the first one.

        Raises InvalidModelError where the file has no such output.
        """
        names = self._names
        if name is None:
            name = next((n for n in (_LOGITS, _HIDDEN) if n in names), names[0])
        if name not in names:
            raise InvalidModelError(
                f"no output {name!r}, which the bundle computes; the file has {', '.join(names)}: "
                "is it the one that was compiled?",
                where=str(self.path),
            )
        self._output = name

    def _feed(self, given: Any, values: _Values) -> np.ndarray:
        """The value of one input of the graph: a batch of one, nothing in the cache."""
        name, dtype = given.name, _DTYPES.get(given.type)
        if dtype is not None and name.startswith(_PAST_PREFIX):
            sizes = _empty_cache(given.shape)
            if len(sizes) == _CACHE_RANK and not isinstance(given.shape[-1], int):
                sizes[-2:] = self._cache_sizes.get(name, (0, 0))
            return np.zeros(sizes, dtype)
        if dtype is not None and len(given.shape) == _PAIRS_RANK and name.endswith(_PAIRS):
            seen = np.tri(len(values[_IDS]), dtype=bool) & (values[_MASK] != 0)
            heads = given.shape[1] if isinstance(given.shape[1], int) else 1
            return np.broadcast_to(pair_values(seen, np.dtype(dtype)), (1, heads, *seen.shape))
        if dtype is None or name not in values:
            raise UnsupportedOpError(
                f"input {name!r} of type {given.type} is unknown; known are "
                f"{', '.join(values)} and {_PAST_PREFIX}*",
                where=str(self.path),
            )
        value: np.ndarray = values[name].astype(dtype)
        return value[None] if given.shape else value  # a scalar has no batch


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of those beside it that hold its weights."""
    model = onnx.load(path, load_external_data=False)
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = (path, *(path.parent / name for name in names))
    return sum(file.stat().st_size for file in files if file.is_file())


def _values(ids: np.ndarray, mask: np.ndarray | None) -> _Values:
    visible = np.ones_like(ids) if mask is None else (np.asarray(mask) != 0).astype(ids.dtype)
    return {
        "input_ids": ids,
        "attention_mask": visible,
        "position_ids": np.maximum(np.cumsum(visible) - 1, 0),
        "token_type_ids": np.zeros_like(ids),
        "use_cache_branch": np.zeros((), np.bool_),  # of optimum's merged decoders, (1,)
        "num_logits_to_keep": np.zeros((), np.int64),  # of the last tokens; 0 is all, () or (1,)
        "logits_to_keep": np.zeros((), np.int64),
        "write_indices": np.zeros((), np.int64),  # of a cache of fixed size, () or (1,)
        "nonpad_kv_seqlen": np.asarray(len(ids)),
    }


def _empty_cache(shape: Sequence[int | str | None]) -> list[int]:
    """A cache's shape at length 0: its symbolic dimensions are the batch, first, and the length.

    One that has the batch alone holds the last columns of a convolution, all of them zero.
    """
    sizes = [size if isinstance(size, int) else 0 for size in shape]
    symbolic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) > 1 or symbolic == [0]:
        sizes[symbolic[0]] = 1
    return sizes


def _refusal(path: str | Path, error: Exception) -> InvalidModelError | UnsupportedOpError:
    words = " ".join(str(error).split())
    if type(error).__name__ == "NotImplemented" or "is not a registered function/op" in words:
        return UnsupportedOpError(
            f"onnxruntime {onnxruntime.__version__} lacks an operator of this file, "
            f"so there is nothing to compare with: {words}",
            where=str(path),
        )
    return InvalidModelError(f"onnxruntime cannot run this file: {words}", where=str(path))
