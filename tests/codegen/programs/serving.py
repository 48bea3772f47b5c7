"""slm-serve, started for a test, and what is said to it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from tests.importer.heads import VOCAB

if TYPE_CHECKING:
    import openai

_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
STOP_SECONDS = 60
TOKENS = 40  # of a completion
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '# ' + m.content + '\n' }}"
    "{% elif m.role == 'user' %}{{ 'def ' + m.content | trim + ':\n' }}"
    "{% else %}{{ m.content + '\n\n\n' }}{% endif %}{% endfor %}"
    '{% if add_generation_prompt %}{{ \'    """\' }}{% endif %}'
)


@dataclass
class Server:
    """A running server: its process, and the port that it listens on."""

    process: subprocess.Popen[str]
    port: int

    def ask(
        self, path: str, body: object = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status of an answer, and its JSON: to POST where there is a body, else to GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STOP_SECONDS)
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, content, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code, and what it wrote as errors."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=STOP_SECONDS)
        return self.process.returncode, errors


@contextmanager
def serving(
    program: Path, bundle: Path, options: Sequence[str] = (), emulator: Sequence[str] = ()
) -> Iterator[Server]:
    """A server on a free port, which ends with the block, without an error."""
    process = subprocess.Popen(
        [*emulator, str(program), str(bundle), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = _LISTENING.search(line)
        assert match, line + process.communicate(timeout=STOP_SECONDS)[1]
        server = Server(process, int(match[1]))
        yield server
        if process.poll() is None:
            code, errors = server.stop()
            assert (code, errors) == (0, ""), (code, errors)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def client_of(server: Server) -> openai.OpenAI:
    """OpenAI's own client; a context, which closes its connections."""
    import openai

    base = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=base, api_key="none", max_retries=0)


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    given = {"temperature": 0, "max_tokens": TOKENS, **more}
    return client.completions.create(model="pycode", prompt=prompt, **given)


def metrics_of(server: Server) -> dict[str, float]:
    status, text = server.ask("/metrics")
    assert status == 200
    return {
        sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def save_words(folder: Path) -> None:
    """A tokenizer of words w0, w1, ... between two special tokens."""
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"[CLS]": VOCAB - 2, "[SEP]": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", VOCAB - 2), ("[SEP]", VOCAB - 1)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
