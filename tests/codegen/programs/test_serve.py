"""slm-serve answers OpenAI's own client, and writes the text that a session writes."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slmtvm.bundle import Bundle
from slmtvm.codegen.program import build_programs
from slmtvm.runtime import load
from slmtvm.runtime.text import generate_text
from slmtvm.target import Target
from tests.codegen.programs.hostile import any_body, any_text
from tests.codegen.programs.serving import Server, client_of, serving
from tests.emulation.session import static_emulator
from tests.end_to_end.bundles import CONTEXT
from tests.models import PROMPTS
from tests.models.pycode import ROOT

pytestmark = pytest.mark.slow
TOKENS = 40


@pytest.fixture(scope="module")
def texts(demo: Path) -> dict[str, str]:
    """What a session writes, greedily, after each prompt."""
    found = {}
    with load(demo) as session:
        for prompt in PROMPTS:
            session.reset()
            found[prompt] = "".join(generate_text(session, prompt, TOKENS))
    return found


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    given = {"temperature": 0, "max_tokens": TOKENS, **more}
    return client.completions.create(model="pycode", prompt=prompt, **given)


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


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pycode"]
    assert client.models.retrieve("pycode").id == "pycode"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "there is no such model"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": "x " * 400}, openai.BadRequestError, f"context is {CONTEXT} tokens"),
        ({"prompt": "x " * 60_000}, openai.BadRequestError, "longer than"),
        ({"prompt": [5000]}, openai.BadRequestError, "5000 is no token"),
        ({"prompt": ["a", "b"]}, openai.BadRequestError, "one prompt a request"),
        ({"temperature": -1}, openai.BadRequestError, "temperature must be a number from 0"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be"),
        ({"n": 2}, openai.BadRequestError, "n must be 1"),
        ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias of token 5 must be"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, 'logit_bias: "x" is no token'),
        ({"presence_penalty": 3}, openai.BadRequestError, "presence_penalty must be a number"),
        ({"frequency_penalty": -2.1}, openai.BadRequestError, "frequency_penalty must be a number"),
        (
            {"extra_body": {"response_format": {"type": "json_object"}}},
            openai.BadRequestError,
            "response_format.type must be text or json_schema",
        ),
        ({"stop": [""]}, openai.BadRequestError, "stop must be strings"),
        ({"stop": ["x"] * 9}, openai.BadRequestError, "more than 8"),
    ],
)
def test_what_is_wrong_is_said_as_openai_says_it(
    client: openai.OpenAI, more: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        client.completions.create(**{"model": "pycode", "prompt": "x", **more})
    assert raised.value.body["type"] == "invalid_request_error"


def test_chat_and_embeddings_say_that_the_model_has_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="no chat template") as raised:
        client.chat.completions.create(model="pycode", messages=[{"role": "user", "content": "x"}])
    assert raised.value.status_code == 501
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="pycode", input="x")


def test_text_becomes_tokens_and_tokens_text(server: Server, demo: Path) -> None:
    text = "def naïve(x):\n\treturn '🐍' \x00"
    _, told = server.ask("/tokenize", {"content": text})
    with load(demo) as session:
        assert told["tokens"] == session.tokenizer.encode(text).ids
    assert server.ask("/detokenize", {"tokens": told["tokens"]}) == (200, {"content": text})


@pytest.fixture
def raw(server: Server) -> Iterator[http.client.HTTPConnection]:
    """One connection for many requests."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        yield connection


def posted(raw: http.client.HTTPConnection, path: str, content: bytes) -> tuple[int, Any]:
    raw.request("POST", path, content, {"Content-Type": "application/json"})
    answer = raw.getresponse()
    return answer.status, json.loads(answer.read())


def test_strings_are_read_and_written_as_python_reads_and_writes_them(
    raw: http.client.HTTPConnection,
) -> None:
    r = random.Random(3)
    for number in range(150):
        text = any_text(r)[:100]  # so that its tokens fit
        whole = re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of pairs
        plain = number % 2 == 0
        content = json.dumps({"content": text if plain else whole}, ensure_ascii=plain)
        expected = json.loads(json.dumps(text if plain else whole))
        expected = re.sub("[\ud800-\udfff]", "\ufffd", expected)
        status, told = posted(raw, "/tokenize", content.encode())
        assert status == 200, told
        tokens = json.dumps({"tokens": told["tokens"]}).encode()
        assert posted(raw, "/detokenize", tokens) == (200, {"content": expected})


def test_a_body_is_json_where_python_says_so(raw: http.client.HTTPConnection) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN is none

    r = random.Random(8)
    seen = {True: 0, False: 0}
    for _ in range(400):
        content = any_body(r)
        if len(content) > 100_000 or content.count(b"[") + content.count(b"{") > 30:
            continue  # what is too long or too deep is refused, too
        try:
            sound = isinstance(json.loads(content.decode(), parse_constant=refuse), dict)
        except ValueError:
            sound = False
        _, answer = posted(raw, "/v1/chat/completions", content)
        said = answer.get("error", {}).get("message", "")
        assert said.startswith("the body is no JSON") != sound, (content, said)
        seen[sound] += 1
    assert min(seen.values()) > 50


def metrics_of(server: Server) -> dict[str, float]:
    status, text = server.ask("/metrics")
    assert status == 200
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


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


def test_a_key_is_asked_for(program: Path, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret-of-ours\n")
    with serving(program, demo, ["--key-file", str(tmp_path / "key")]) as server:
        for given in (None, "Bearer secret-of-our", "Bearer secret-of-ours2", "secret-of-ours"):
            headers = {} if given is None else {"Authorization": given}
            status, answer = server.ask("/v1/models", headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer secret-of-ours"}
        assert server.ask("/v1/models", headers=right)[0] == 200
        assert server.ask("/healthz")[0] == 200


def test_a_page_of_another_name_that_leads_here_is_turned_away(server: Server) -> None:
    status, answer = server.ask("/v1/models", headers={"Host": "evil.example"})
    assert (status, answer["error"]["code"]) == (403, "foreign_host")
    assert server.ask("/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_the_queue_has_an_end(program: Path, demo: Path) -> None:
    options = ["--sessions", "1", "--queue", "0"]
    with serving(program, demo, options) as server:
        slow = {"prompt": "x", "max_tokens": CONTEXT, "temperature": 2, "seed": 1}
        statuses = []
        threads = [
            threading.Thread(target=lambda: statuses.append(server.ask("/v1/completions", slow)[0]))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 200 in statuses and set(statuses) <= {200, 503}
        assert server.ask("/healthz") == (200, {"status": "ok"})


def test_who_goes_away_is_not_computed_for(program: Path, demo: Path) -> None:
    with serving(program, demo, ["--sessions", "1"]) as server:
        body = b'{"prompt": "x", "max_tokens": 100000, "temperature": 2, "stream": true}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            b"\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head + body)
            assert raw.recv(1)
        until = time.monotonic() + 30
        while metrics_of(server)["slm_num_requests_running"] and time.monotonic() < until:
            time.sleep(0.05)
        told = metrics_of(server)
        assert told["slm_num_requests_running"] == 0
        if told["slm_requests_cancelled_total"] == 0:  # it was written before that was seen
            assert told["slm_request_success_total{finished_reason=length}"] == 1


def test_a_request_that_takes_too_long_is_ended(program: Path, demo: Path) -> None:
    ask = {"prompt": "x", "max_tokens": CONTEXT, "temperature": 2, "seed": 1}
    with serving(program, demo, ["--timeout", "0.001"]) as server:
        status, answer = server.ask("/v1/completions", ask)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        status, events = server.ask("/v1/completions", {**ask, "stream": True})
        if status == 200:  # it had begun: the error is its last event
            assert '"code":"timeout"' in events.strip().splitlines()[-1]
        else:
            assert (status, events["error"]["code"]) == (504, "timeout")


def test_a_body_may_wait_for_leave_to_come(server: Server) -> None:
    body = b'{"content": "x"}'
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall(head)
        assert raw.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(body)
        assert b"".join(iter(lambda: raw.recv(4096), b"")).startswith(b"HTTP/1.1 200 OK")


def test_sigterm_lets_what_runs_finish(program: Path, demo: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(program, demo))
        client = stack.enter_context(client_of(server))
        stream = client.completions.create(
            model=demo.name.removesuffix(".slm")[:127], prompt="x", max_tokens=200, stream=True,
            temperature=0,
        )  # fmt: skip
        events = iter(stream)
        next(events)
        code, errors = server.stop()
        assert (code, errors) == (0, "")
        assert [e.choices[0].finish_reason for e in events][-1] in ("length", "stop")


def test_the_command_becomes_the_server(program: Path, demo: Path) -> None:
    command = [sys.executable, "-m", "slmtvm.cli", "--quiet"]
    with serving(Path("serve"), demo, ["--name", "ours"], emulator=command) as server:
        assert server.ask("/v1/models/ours")[0] == 200


def test_a_unix_socket_serves_its_owner(program: Path, demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "slm.sock"
    with subprocess.Popen(
        [program, demo, "--unix", path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline().endswith(f"unix:{path}\n")
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: raw.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b'{"status":"ok"}')
        process.terminate()
        assert process.wait(30) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 64, "usage: slm-serve BUNDLE"),
        (["{bundle}", "--colour", "x"], 64, "there is no option --colour"),
        (["{bundle}", "--port", "70000"], 64, "--port cannot be 70000"),
        (["{bundle}", "--host", "0.0.0.0"], 64, "is open to other machines"),
        (["{bundle}", "--host", "here.example", "--open"], 1, "is no address"),
        (["{bundle}", "--key-file", "/no/file"], 1, "/no/file: No such file"),
        (["/no/bundle"], 1, "/no/bundle"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_in_one_line(
    program: Path, demo: Path, options: list[str], code: int, message: str
) -> None:
    given = [option.format(bundle=demo) for option in options]
    result = subprocess.run([program, *given], capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert message in result.stderr
