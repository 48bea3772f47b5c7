"""slm-serve writes for OpenAI's own client the text that a session writes."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from slmtvm.codegen.program import build_programs
from slmtvm.runtime import load
from slmtvm.target import Target
from tests.codegen.programs.serving import TOKENS, Server, complete, metrics_of, serving
from tests.emulation.session import static_emulator
from tests.models import PROMPTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_text_of_a_session(
    client: openai.OpenAI, texts: dict[str, str], prompt: str
) -> None:
    answer = complete(client, prompt)
    assert answer.choices[0].text == texts[prompt]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == TOKENS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + TOKENS


def test_a_stream_brings_the_same_text_piece_by_piece_and_its_usage(
    client: openai.OpenAI, texts: dict[str, str]
) -> None:
    prompt = PROMPTS[1]
    events = list(complete(client, prompt, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0].text for event in events if event.choices]
    assert "".join(pieces) == texts[prompt] and len(pieces) > TOKENS // 2
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == TOKENS
    assert len({event.id for event in events}) == 1


@pytest.mark.parametrize("name", ["cortex-a78", "riscv64-rvv"])
def test_other_machines_write_the_same_text(
    demo: Path, texts: dict[str, str], name: str, tmp_path: Path
) -> None:
    target = Target.load(name)
    (program,) = build_programs(demo, [name], tmp_path, names=["serve"])
    assert program.stat().st_size < 400_000
    with serving(program, demo, emulator=static_emulator(target)) as server:
        asked = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": TOKENS}
        status, answer = server.ask("/v1/completions", asked)
    assert status == 200 and answer["choices"][0]["text"] == texts[PROMPTS[0]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_its_stop_string_even_where_pieces_cut_it(
    client: openai.OpenAI, texts: dict[str, str], stream: bool
) -> None:
    whole = texts[PROMPTS[0]]
    stop = whole[12:23]  # begins and ends inside tokens
    answer = complete(client, PROMPTS[0], stop=["never there", stop], stream=stream)
    choices = [event.choices[0] for event in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_shared_prefix_is_not_computed_again_and_changes_nothing(
    program: Path, demo: Path
) -> None:
    prefix = "\n".join(PROMPTS)
    ask = {"temperature": 0, "max_tokens": 16, "logprobs": 2}
    with serving(program, demo, ["--sessions", "1"]) as server:

        def answers(*prompts: str) -> list[dict[str, Any]]:
            return [server.ask("/v1/completions", {"prompt": p, **ask})[1] for p in prompts]

        _, bare, _, again = answers("x = 1", prefix + "\n\na = ", prefix, prefix + "\n\na = ")
    assert bare["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    usage = again["usage"]
    shared = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] - 5 <= shared < usage["prompt_tokens"]
    # All digits of the logprobs: the logits have the same bits.
    assert again["choices"] == bare["choices"]


def test_a_prompt_of_token_ids_that_repeats_needs_its_last_token_alone(server: Server) -> None:
    _, told = server.ask("/tokenize", {"content": PROMPTS[2]})
    for _ in range(2):
        _, answer = server.ask("/v1/completions", {"prompt": told["tokens"], "temperature": 0})
    usage = answer["usage"]
    assert usage["prompt_tokens"] == told["count"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == told["count"] - 1


def test_texts_at_the_same_time_are_those_that_come_alone(
    client: openai.OpenAI, texts: dict[str, str]
) -> None:
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        found[prompt] = complete(client, prompt).choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == texts


def test_texts_that_are_written_at_once_are_evaluated_together(
    program: Path, demo: Path, texts: dict[str, str]
) -> None:
    prompts = PROMPTS[:4]
    with serving(program, demo, ["--sessions", "5"]) as server:
        server.process.send_signal(signal.SIGSTOP)  # for all requests to be there at the same time
        waiting = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(5)]
        for connection, prompt in zip(waiting, [*prompts, "gone"], strict=True):
            body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            given = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), given)
        waiting.pop().close()  # who asked last goes away
        server.process.send_signal(signal.SIGCONT)
        for connection, prompt in zip(waiting, prompts, strict=True):
            answer = json.loads(connection.getresponse().read())
            assert answer["choices"][0]["text"] == texts[prompt]
            connection.close()
        counted = metrics_of(server)
        assert counted["slm_batched_tokens_total"] > TOKENS
        assert counted["slm_requests_cancelled_total"] == 1


def test_a_seed_makes_a_random_text_repeatable(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return str(complete(client, "x", temperature=1.5, top_p=0.9, seed=seed).choices[0].text)

    assert text(7) == text(7) != text(8)


def test_log_probabilities_are_those_of_the_logits(
    client: openai.OpenAI, demo: Path, texts: dict[str, str]
) -> None:
    import numpy as np

    answer = complete(client, PROMPTS[0], logprobs=3, max_tokens=6).choices[0].logprobs
    with load(demo) as session:
        ids = session.tokenizer.encode(PROMPTS[0]).ids
        logits = session.eval(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        best = np.argsort(-logprobs, kind="stable")[:3]
        told = answer.top_logprobs[0]
        assert list(told) == [session.tokenizer.decode([int(i)]) for i in best]
        np.testing.assert_allclose(list(told.values()), logprobs[best], rtol=1e-5)
    assert answer.token_logprobs[0] == pytest.approx(told[answer.tokens[0]])
    assert texts[PROMPTS[0]].startswith("".join(answer.tokens))
    assert len(answer.tokens) == len(answer.token_logprobs) == 6


def test_the_tokens_of_a_text_are_told_where_they_are_asked_for(
    server: Server, demo: Path, texts: dict[str, str]
) -> None:
    ask = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    _, answer = server.ask("/v1/completions", ask)
    ids = answer["choices"][0]["token_ids"]
    _, events = server.ask("/v1/completions", {**ask, "stream": True})
    told = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert [i for event in told for i in event["choices"][0].get("token_ids", [])] == ids
    with load(demo) as session:
        prompt = session.tokenizer.encode(PROMPTS[0]).ids
        assert ids == list(session.generate(prompt, TOKENS))
