"""The demo model's bundle, and slm-serve for this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from slmtvm.runtime import load
from slmtvm.runtime.serving import server_program
from slmtvm.runtime.text import generate_text
from slmtvm.text.chat import ChatTemplate, compile_chat
from tests.codegen.programs.serving import CHAT_TEMPLATE, TOKENS, Server, client_of, serving
from tests.end_to_end.bundles import TARGETS_OF_THREE, bundle_for
from tests.models import PROMPTS

if TYPE_CHECKING:  # it takes two seconds, and many tests here need none
    import openai


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(tmp_path_factory, "demo", TARGETS_OF_THREE)


@pytest.fixture(scope="session")
def program(demo: Path) -> Path:
    return server_program(demo)


@pytest.fixture(scope="module")
def server(program: Path, demo: Path) -> Iterator[Server]:
    with serving(program, demo, ["--name", "pycode"]) as running:
        yield running


@pytest.fixture(scope="session")
def chat_bundle(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle with a chat template, as if one lay beside the model."""
    bundle = tmp_path_factory.mktemp("chat") / "chat.slm"
    bundle.mkdir()
    for file in demo.iterdir():
        (bundle / file.name).symlink_to(file)
    pieces = compile_chat(ChatTemplate(CHAT_TEMPLATE, {}))
    assert pieces.reason is None
    (bundle / "chat.json").write_bytes(pieces.to_json())
    return bundle


@pytest.fixture(scope="session")
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
