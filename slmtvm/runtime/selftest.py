"""What a device must compute: recorded where the model was compiled, compared by slm-selftest.

Results do not depend on the machine, so that the comparison is one of bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from slmtvm.errors import BundleError
from slmtvm.runtime.session import Session, load

_TOKENS = 37  # more than two of the smaller chunks, and no multiple of any
_SEED = 17


def record_selftest(bundle: Path, target: str) -> dict[str, Any] | None:
    """JSON values: ``tokens``, a ``source`` where the model reads one, and ``sha256`` of results.

    These are float32, little endian: a decoder's logits after each token; all outputs of an
    encoder, one after the other. None where this machine cannot run ``target``.
    """
    try:
        session = load(bundle, target=target, check=False)
    except BundleError:  # such as a folder that nothing may be executed from
        return None
    with session:
        return _record(session)


def _record(session: Session) -> dict[str, Any]:
    info = session.info
    generator = np.random.default_rng(_SEED)
    # Padding may be no token like any other.
    usual = np.setdiff1d(np.arange(info["vocab_size"]), info.get("padding", ()))

    def tokens(most: int) -> list[int]:
        return generator.choice(usual, min(_TOKENS, most)).tolist()

    recorded: dict[str, Any] = {}
    if info["kind"] == "encoder-decoder":
        recorded["source"] = tokens(info["source_context"])
        session.encode(recorded["source"])
    recorded["tokens"] = tokens(info["context"])
    if info.get("final_token") is not None:
        recorded["tokens"][-1] = info["final_token"]
    if info["kind"] == "encoder":
        results = list(session.outputs(recorded["tokens"]).values())
    else:
        results = [session.eval_all(recorded["tokens"])]
    digest = hashlib.sha256()
    for values in results:
        digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    recorded["sha256"] = digest.hexdigest()
    return recorded
