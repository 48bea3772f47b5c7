"""How much memory a model takes on the device, to the byte, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from slmtvm.plan.model import Plan

_ALIGNMENT = 64  # bytes
_SESSION_STRUCT = 128  # bytes: slm_session with its padding


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes that a session and its model take; pages that are never touched cost nothing.

    ``state`` is the KV cache for the whole context, ``arena`` the activations, ``io`` token ids,
    logits and what sampling needs; ``scratch_per_thread`` counts once for each thread. ``weights``
    is the mapped file, shared by all sessions and processes.
    """

    state: int
    arena: int
    scratch_per_thread: int
    io: int
    weights: int

    def session(self, threads: int) -> int:
        """What slm_session_bytes returns for a model with ``threads`` threads."""
        scratch = _aligned(self.scratch_per_thread * threads)
        return self.state + self.arena + scratch + self.io


def predict_memory(plan: Plan, weights_bytes: int) -> MemoryPrediction:
    """The memory of one session of ``plan``; the same sums as ``plan_memory`` of session.c."""
    decoder = plan.kind != "encoder"
    token_rows = max(f.rows for f in plan.functions if f.name in ("body", "source"))
    vocabulary = plan.vocab_size if decoder else 0
    context = plan.context if decoder else 0
    pieces = (
        _SESSION_STRUCT,
        token_rows * 4,  # token ids of a step
        plan.output_bytes,
        context * 4,  # token ids of the context
        vocabulary,  # marks of the tokens in the context
        vocabulary * 8,  # candidates for sampling: a logit and an id
    )
    return MemoryPrediction(
        state=_aligned(plan.state_bytes),
        arena=_aligned(plan.arena_bytes),
        scratch_per_thread=plan.scratch_bytes,
        io=sum(_aligned(piece) for piece in pieces),
        weights=weights_bytes,
    )


def _aligned(count: int) -> int:
    return count + -count % _ALIGNMENT
