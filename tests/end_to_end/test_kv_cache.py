"""A KV cache in float16 beside one in float32, on the demo model."""

from __future__ import annotations

import numpy as np
import pytest

import slmtvm
from tests.end_to_end.bundles import bundle_for
from tests.end_to_end.reference import mean_kl
from tests.models import heldout_ids

WINDOWS, WINDOW = 4, 256
# nats. In float32 the difference is that of rounding keys and values. Where activations are int8
# it is that of their rounding, which any difference in the last bits of a float changes.
MAX_KL = {"float32": 1e-6, "demo": 1e-3}


@pytest.mark.parametrize("form", MAX_KL)
def test_a_float16_cache_takes_half_the_memory_and_changes_little(
    form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    windows = heldout_ids()[: WINDOWS * WINDOW].reshape(WINDOWS, WINDOW)
    logits, sizes = {}, {}
    for kv in ("f16", "f32"):
        with slmtvm.load(bundle_for(tmp_path_factory, form, ("host",), kv)) as session:
            info = session.info
            sizes[kv] = (info["kv_bytes_per_token"], info["memory"]["state"])
            rows = []
            for tokens in windows:
                session.reset()
                rows.append(session.eval_all(tokens))
            logits[kv] = np.concatenate(rows)
    assert sizes["f32"] == tuple(2 * size for size in sizes["f16"])
    assert 0 < mean_kl(logits["f32"], logits["f16"]) < MAX_KL[form]
