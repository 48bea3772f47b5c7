"""Tokens that a model is checked on where none are given."""

from __future__ import annotations

import numpy as np
from tvm import relax

from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference.layers import embedding

_OVERFLOWS = 1e19  # squared, beyond float32
_SEED = 0
_ROWS = 4096  # of a table that are in float32 at a time


def probing_tokens(model: CanonicalModel, count: int) -> np.ndarray:
    """``count`` token ids int32: half drawn at random, half those with the largest embeddings.

    What acts on large values alone, a clip or a narrow type, acts on these first. None is one that
    the file's positions leave out, or whose embedding's square overflows: of such a token no number
    comes that could be compared. The same model gives the same tokens.
    """
    usual = np.setdiff1d(np.arange(model.vocab_size), model.padding)
    norms = embedding_norms(model, "main")
    if norms is not None and (norms[usual] < _OVERFLOWS).any():
        usual = usual[norms[usual] < _OVERFLOWS]
    random = np.random.default_rng(_SEED)
    drawn = random.choice(usual, count - count // 2)
    largest = drawn if norms is None else usual[np.argsort(-norms[usual], kind="stable")]
    both = np.concatenate([drawn, np.resize(largest, count // 2)])
    return random.permutation(both).astype(np.int32)


def embedding_norms(model: CanonicalModel, name: str) -> np.ndarray | None:
    """The norm of each token's embedding (vocab,) in the function ``name``, 0 if not finite; None
    without a table."""
    function = model.module[name]
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not (isinstance(call, relax.Call) and call.op == ops.EMBEDDING):
                continue
            if not call.args[0].same_as(function.params[0]):
                continue  # of token types
            attrs = {key: call.attrs[key] for key in call.attrs.keys()}  # noqa: SIM118 (not a dict)
            named = {key: model.params[arg.name] for key, arg in ops.operands(call).items()}
            tokens = np.arange(model.vocab_size)
            parts = [
                np.linalg.norm(
                    embedding(tokens[at : at + _ROWS], attrs, "", **named).astype(np.float64),
                    axis=1,
                )
                for at in range(0, len(tokens), _ROWS)
            ]
            return np.nan_to_num(np.concatenate(parts), nan=0, posinf=0, neginf=0)
    return None
