#!/usr/bin/env python3
"""llama.cpp decoding several sequences with one call, in a process of its own, for bench_batch.py.

    python scripts/peer_batch.py MODEL.gguf SEQUENCES POSITION THREADS

So does the server of llama.cpp with requests that it answers at the same time. It reads numbers
of tokens from standard input, a line each, and answers with the seconds that it took to decode so
many of each sequence after POSITION tokens, with all logits.
"""

from __future__ import annotations

import sys
import time

import llama_cpp as api

PROMPT_TOKEN, TOKEN = 3, 5


def context_of(path: str, sequences: int, position: int, threads: int) -> object:
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    globals()["_quiet"] = quiet  # it is called as long as the process lives
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), model_params)
    params = api.llama_context_default_params()
    params.n_ctx = sequences * 1024
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params) if model else None
    if not context:
        raise SystemExit(f"llama.cpp cannot open {path}")
    return context


def decode(context: object, batch: api.llama_batch, rows: list[tuple[int, int, int]]) -> None:
    """Rows of token, position, sequence, all with logits."""
    batch.n_tokens = len(rows)
    for i, (token, place, sequence) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = token, place, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    if api.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    api.llama_get_logits_ith(context, -1)  # waits for them


def main() -> None:
    path, sequences, position, threads = sys.argv[1], *map(int, sys.argv[2:5])
    context = context_of(path, sequences, position, threads)
    memory = api.llama_get_memory(context)
    batch = api.llama_batch_init(512, 0, 1)
    for sequence in range(sequences):
        decode(context, batch, [(PROMPT_TOKEN, place, sequence) for place in range(position)])
    print("ready", flush=True)
    for line in sys.stdin:
        for sequence in range(sequences):
            api.llama_memory_seq_rm(memory, sequence, position, -1)
        begin = time.perf_counter()
        for place in range(position, position + int(line)):
            decode(context, batch, [(TOKEN, place, sequence) for sequence in range(sequences)])
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
