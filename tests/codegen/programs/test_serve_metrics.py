"""What slm-serve counts, and the memory that it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openai
import pytest

from slmtvm.bundle import Bundle
from tests.codegen.programs.serving import TOKENS, Server, complete, metrics_of
from tests.models import PROMPTS
from tests.models.pycode import ROOT

pytestmark = pytest.mark.slow


def test_metrics_count_what_was_done(server: Server, client: openai.OpenAI) -> None:
    before = metrics_of(server)
    answer = complete(client, PROMPTS[3])
    after = metrics_of(server)

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew("slm_generation_tokens_total") == TOKENS
    assert grew("slm_prompt_tokens_total") == answer.usage.prompt_tokens
    assert grew("slm_request_success_total{finished_reason=length}") == 1
    assert grew("slm_time_to_first_token_seconds_count") == 1
    assert grew("slm_time_to_first_token_seconds_bucket{le=+Inf}") == 1
    assert grew("slm_time_per_output_token_seconds_count") == TOKENS - 1
    assert after["slm_num_requests_running"] == 0
    assert 0 < after["slm_kv_cache_usage_perc"] <= 1
    assert after["process_resident_memory_bytes"] > 0


def test_the_board_for_grafana_shows_what_the_server_counts(server: Server) -> None:
    board = json.loads((ROOT / "examples" / "grafana.json").read_text())
    shown = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:slm|process)_\w+", target["expr"])
    }
    told = {name.partition("{")[0] for name in metrics_of(server)}
    # A machine without sensors has no temperatures.
    assert len(shown) > 10 and shown - told <= {"slm_temperature_celsius"}


def test_no_more_memory_is_used_than_was_said_beforehand(server: Server, demo: Path) -> None:
    weights = Bundle.open(demo).manifest.weights.bytes
    tables = (demo / "tokenizer.bin").stat().st_size
    told = metrics_of(server)
    most = told["slm_memory_planned_bytes"] + weights + tables + 3_000_000
    assert told["process_resident_memory_bytes"] < most
