#!/usr/bin/env python3
"""One engine in a process of its own, timed on commands from scripts/bench_peers.py.

    python scripts/peer_engines.py ENGINE FILE THREADS

Reads JSON commands from standard input, a line each, and answers a line each:

    {"phase": "prefill", "tokens": [...]}                  -> {"seconds": s}
    {"phase": "decode", "tokens": [...], "count": n}       -> {"seconds": s}
    {"phase": "encode", "tokens": [...]}                   -> {"seconds": s}

prefill evaluates the tokens from an empty context, to the logits of the last; decode evaluates
``count`` tokens one by one, greedily, after the prompt. Making contexts, the prompt before a decode
and everything that happens once are not timed. The first line printed, {"settings": ...}, says that
the engine is ready, and how it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CONTEXT = 1024  # tokens that each engine has room for
ENCODER_TOKENS = 128  # that engines are told of beforehand
CALIBRATION_ROUNDS = 3


class Engine(Protocol):
    """What a worker process drives; every method returns seconds."""

    settings: dict[str, Any]

    def prefill(self, tokens: Sequence[int]) -> float: ...

    def decode(self, tokens: Sequence[int], count: int) -> float: ...


class Slmtvm:
    """A bundle, as an application in Python runs it."""

    def __init__(self, path: Path, threads: int) -> None:
        import slmtvm

        self._session = slmtvm.load(path, threads=threads)
        self.settings: dict[str, Any] = {"target": self._session.info["target"]}

    def prefill(self, tokens: Sequence[int]) -> float:
        prompt = list(tokens)
        self._session.reset()
        begin = time.perf_counter()
        self._session.eval(prompt)
        return time.perf_counter() - begin

    def decode(self, tokens: Sequence[int], count: int) -> float:
        self._session.reset()
        generated = self._session.generate(list(tokens), count + 1)
        next(generated)  # chosen from the prompt's logits: nothing is evaluated
        begin = time.perf_counter()
        evaluated = sum(1 for _ in generated)
        seconds = time.perf_counter() - begin
        if evaluated != count:
            raise RuntimeError("slmtvm ended before the count of tokens")
        return seconds

    def encode(self, tokens: Sequence[int]) -> float:
        begin = time.perf_counter()
        self._session.encode(list(tokens))
        return time.perf_counter() - begin


class OnnxRuntime:
    """A decoder with past inputs as GroupQueryAttention wants it: past and present are one buffer,
    bound once, so that a step binds nothing but its tokens and its mask."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self._session = _ort_session(path, threads)
        shapes = {i.name: i.shape for i in self._session.get_inputs()}
        self._past = [name for name in shapes if name.startswith("past_key_values")]
        config = json.loads((path.parent / "genai_config.json").read_text())["model"]
        self._vocab = config["vocab_size"]
        decoder = config["decoder"]
        self._kv = (1, decoder["num_key_value_heads"], CONTEXT, decoder["head_size"])
        self._cache = {name: self._value(np.zeros(self._kv, np.float32)) for name in self._past}
        self._bindings: dict[int, tuple[Any, Any, Any]] = {}
        self.settings: dict[str, Any] = {"io_binding": True, "shared_kv_buffer": True}

    def _value(self, array: np.ndarray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)

    def _binding(self, count: int) -> tuple[Any, Any, Any]:
        """The binding for a step of ``count`` tokens, its ids and its logits."""
        if count not in self._bindings:
            binding = self._session.io_binding()
            ids = self._value(np.zeros((1, count), np.int64))
            logits = self._value(np.zeros((1, count, self._vocab), np.float32))
            binding.bind_ortvalue_input("input_ids", ids)
            binding.bind_ortvalue_output("logits", logits)
            for name in self._past:
                binding.bind_ortvalue_input(name, self._cache[name])
                present = name.replace("past_key_values", "present")
                binding.bind_ortvalue_output(present, self._cache[name])
            self._bindings[count] = (binding, ids, logits)
        return self._bindings[count]

    def _eval(self, tokens: Sequence[int], position: int) -> int:
        binding, ids, logits = self._binding(len(tokens))
        ids.update_inplace(np.array([tokens], np.int64))
        total = position + len(tokens)
        binding.bind_ortvalue_input("attention_mask", self._value(np.ones((1, total), np.int64)))
        self._session.run_with_iobinding(binding)
        return int(logits.numpy()[0, -1].argmax())

    def prefill(self, tokens: Sequence[int]) -> float:
        begin = time.perf_counter()
        self._eval(tokens, 0)
        return time.perf_counter() - begin

    def decode(self, tokens: Sequence[int], count: int) -> float:
        token = self._eval(tokens, 0)
        begin = time.perf_counter()
        for position in range(len(tokens), len(tokens) + count):
            token = self._eval([token], position)
        return time.perf_counter() - begin


class OnnxRuntimeEncoder:
    """input_ids -> hidden states."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = _ort_session(path, threads)
        self._names = [i.name for i in self._session.get_inputs()]
        self.settings: dict[str, Any] = {}

    def encode(self, tokens: Sequence[int]) -> float:
        ids = np.array([tokens], np.int64)
        inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
        feed = {name: inputs[name] for name in self._names}
        begin = time.perf_counter()
        self._session.run(None, feed)
        return time.perf_counter() - begin


class DeepSparse:
    """Neural Magic's engine for pruned encoders: input_ids -> hidden states."""

    def __init__(self, path: Path, threads: int) -> None:
        import deepsparse

        # It writes beside the file that it is given.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy(path, folder))
            shapes = [[1, ENCODER_TOKENS]]
            self._engine = deepsparse.Engine(
                str(copy), batch_size=1, num_cores=threads, input_shapes=shapes
            )
        self.settings: dict[str, Any] = {"version": deepsparse.__version__}

    def encode(self, tokens: Sequence[int]) -> float:
        ids = np.array([tokens], np.int64)
        begin = time.perf_counter()
        self._engine.run([ids])
        return time.perf_counter() - begin


class OnnxRuntimeGenai:
    """The Generator API; a minimum length keeps it from stopping at an end-of-sequence token."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        overlay = {"model": {"decoder": {"session_options": options}}}
        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps(overlay))
        self._model = onnxruntime_genai.Model(config)
        self.settings: dict[str, Any] = {}

    def _generator(self) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(min_length=CONTEXT, max_length=CONTEXT, do_sample=False)
        return self._genai.Generator(self._model, params)

    def prefill(self, tokens: Sequence[int]) -> float:
        generator, ids = self._generator(), np.array(tokens, np.int32)
        begin = time.perf_counter()
        generator.append_tokens(ids)
        return time.perf_counter() - begin

    def decode(self, tokens: Sequence[int], count: int) -> float:
        generator = self._generator()
        generator.append_tokens(np.array(tokens, np.int32))
        generator.generate_next_token()  # samples from the prompt's logits, evaluates nothing
        begin = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        seconds = time.perf_counter() - begin
        if generator.token_count() != len(tokens) + count + 1:
            raise RuntimeError("onnxruntime-genai ended before the count of tokens")
        return seconds


class LlamaCpp:
    """llama_decode through the C interface that llama-cpp-python loads.

    Flash attention, and the repacked weights (with AMX where it was built in), are on or off,
    whichever a few measurements find faster; each phase has its own choice.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._contexts: dict[str, tuple[Any, int]] = {}
        for repack in (True, False):
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers, params.use_extra_bufts = 0, repack
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
            if not model:
                raise RuntimeError(f"llama.cpp cannot load {path}")
            vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            for flash in (False, True):
                context = llama_cpp.llama_init_from_model(model, self._params(threads, flash))
                if not context:
                    raise RuntimeError("llama.cpp cannot make a context")
                self._contexts[f"repack={repack} flash_attention={flash}"] = (context, vocab)
        rng = np.random.default_rng(0)
        prompt = [int(t) for t in rng.integers(1, vocab, 128)]
        self._best = {
            "prefill": self._fastest(lambda name: self._time_prefill(name, prompt)),
            "decode": self._fastest(lambda name: self._time_decode(name, prompt[:16], 32)),
        }
        info = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.settings: dict[str, Any] = {**self._best, "system": info}

    def _params(self, threads: int, flash: bool) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        params.no_perf = True
        return params

    def _fastest(self, measure: Callable[[str], float]) -> str:
        times = {name: [] for name in self._contexts}
        for _ in range(CALIBRATION_ROUNDS):
            for name, seconds in times.items():
                seconds.append(measure(name))
        return min(times, key=lambda name: min(times[name]))

    def _eval(self, context: Any, tokens: Sequence[int]) -> None:
        array = (self._api.llama_token * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if self._api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _next(self, context: Any, vocab: int) -> int:
        logits = self._api.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def _time_prefill(self, name: str, tokens: Sequence[int]) -> float:
        context, vocab = self._contexts[name]
        self._api.llama_memory_clear(self._api.llama_get_memory(context), False)
        begin = time.perf_counter()
        self._eval(context, tokens)
        self._next(context, vocab)
        return time.perf_counter() - begin

    def _time_decode(self, name: str, tokens: Sequence[int], count: int) -> float:
        context, vocab = self._contexts[name]
        self._time_prefill(name, tokens)
        token = self._next(context, vocab)
        begin = time.perf_counter()
        for _ in range(count):
            self._eval(context, [token])
            token = self._next(context, vocab)
        return time.perf_counter() - begin

    def prefill(self, tokens: Sequence[int]) -> float:
        return self._time_prefill(self._best["prefill"], tokens)

    def decode(self, tokens: Sequence[int], count: int) -> float:
        return self._time_decode(self._best["decode"], tokens, count)


ENGINES: dict[str, Callable[[Path, int], Any]] = {
    "slmtvm": Slmtvm,
    "onnxruntime": OnnxRuntime,
    "onnxruntime-encoder": OnnxRuntimeEncoder,
    "onnxruntime-genai": OnnxRuntimeGenai,
    "deepsparse": DeepSparse,
    "llama.cpp": LlamaCpp,
}


def _ort_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextmanager
def _answers() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes answers to the real standard output; whatever a library prints goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def answer(value: dict[str, Any]) -> None:
            print(json.dumps(value), file=out, flush=True)

        yield answer


def main() -> None:
    name, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with _answers() as answer:
        engine = ENGINES[name](path, threads)
        answer({"settings": engine.settings})
        for line in sys.stdin:
            command = json.loads(line)
            run = getattr(engine, command.pop("phase"))
            answer({"seconds": run(**command)})


if __name__ == "__main__":
    main()
