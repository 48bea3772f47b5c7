"""Several texts at once: the weights are read once for a token of each."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack

from slmtvm.runtime.model import Model
from slmtvm.runtime.session import Session, Tokens


def generate_batch(
    model: Model,
    prompts: Sequence[Tokens],
    max_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    repetition_penalty: float = 0.0,
    seed: int | None = None,
    stop: Collection[int] = (),
) -> list[list[int]]:
    """What follows each of ``prompts``, each (n,) token ids: up to ``max_tokens`` ids of each.

    Each has a session of its own, in memory at the same time, and gives what ``Session.generate``
    gives with the same parameters. Raises DeviceError where that does.
    """
    chosen = int.from_bytes(os.urandom(8), "little") if seed is None else seed
    texts: list[list[int]] = [[] for _ in prompts]
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(model)) for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.eval(prompt)
        running = list(range(len(prompts))) if max_tokens > 0 else []
        while running:
            going_on = []
            for index in running:
                token = sessions[index].sample(
                    temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                    repetition_penalty=repetition_penalty, seed=chosen,
                )  # fmt: skip
                if token in stop:
                    continue
                texts[index].append(token)
                room = sessions[index].position < model.info["context"]
                if len(texts[index]) < max_tokens and room:
                    going_on.append(index)
            running = going_on
            if running:
                Session.eval_batch([sessions[i] for i in running], [texts[i][-1] for i in running])
    return texts
