"""KV caches in float16, int8 and int4 beside one in float32, on the demo model."""

from __future__ import annotations

import numpy as np
import pytest

import slmtvm
from tests.end_to_end.bundles import bundle_for
from tests.end_to_end.reference import mean_kl
from tests.models import heldout_ids

WINDOWS, WINDOW = 4, 256
# nats, by form and kind of cache. In the float form the difference is that of rounding keys and
# values. Where activations are int8 it is that of their rounding, which any difference in the last
# bits of a float changes.
MAX_KL = {
    ("float32", "f16"): 1e-6,
    ("float32", "int8"): 2e-4,
    ("float32", "int4"): 2e-2,
    ("demo", "f16"): 1e-3,
    ("demo", "int8"): 1e-3,
}
# Bytes beside float32's: each head's 32 features share a scale of 4 bytes.
SIZES = {"f16": 1 / 2, "int8": (32 + 4) / (32 * 4), "int4": (16 + 4) / (32 * 4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kv"),
    [
        pytest.param(*key, marks=pytest.mark.exhaustive if key == ("demo", "int8") else ())
        for key in MAX_KL
    ],
)
def test_a_narrower_cache_takes_less_memory_and_changes_little(
    form: str, kv: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    windows = heldout_ids()[: WINDOWS * WINDOW].reshape(WINDOWS, WINDOW)
    logits, sizes = {}, {}
    for kind in (kv, "f32"):
        with slmtvm.load(bundle_for(tmp_path_factory, form, ("host",), kind)) as session:
            info = session.info
            assert info["kv"] == kind
            sizes[kind] = (info["kv_bytes_per_token"], info["memory"]["state"])
            rows = []
            for tokens in windows:
                session.reset()
                rows.append(session.eval_all(tokens))
            logits[kind] = np.concatenate(rows)
    assert sizes[kv] == tuple(size * SIZES[kv] for size in sizes["f32"])
    kl = mean_kl(logits["f32"], logits[kv])
    print(f"{form} with a {kv} cache: {kl:.2e} nats")
    assert 0 < kl < MAX_KL[form, kv]
