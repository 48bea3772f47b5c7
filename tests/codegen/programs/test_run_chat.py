"""slm-run writes and answers what `slmtvm run` does: chats, files, stop strings, biases, JSON."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pytest

from slmtvm.cli.main import main
from slmtvm.codegen.program import build_programs
from slmtvm.runtime import load
from slmtvm.runtime.chat import Conversation
from slmtvm.runtime.text import generate_text
from slmtvm.target import Target, host_target
from slmtvm.text.chat import ChatTemplate, compile_chat
from tests.codegen.programs.serving import CHAT_TEMPLATE
from tests.emulation.session import static_emulator
from tests.models import PROMPTS

pytestmark = pytest.mark.slow
TOKENS = 12
SYSTEM = "Files."
ASKED = (" read_file(path) ", "write_file(päth, '🐍')", "close()")


@pytest.fixture(scope="module")
def native(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    (program,) = build_programs(demo, [host_target().name], folder, names=["run"])
    return program


def output_of(
    command: Sequence[str | Path], bundle: Path, arguments: Sequence[str], text: str = ""
) -> str:
    result = subprocess.run(
        [*command, bundle, "--max-tokens", str(TOKENS), *arguments],
        input=text, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def agree(
    native: Path, bundle: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> str:
    """What both write for the same arguments, which is the same."""
    ours = output_of([native], bundle, arguments)
    capfd.readouterr()
    assert main(["run", str(bundle), "--max-tokens", str(TOKENS), *arguments]) == 0
    assert ours == capfd.readouterr().out
    return ours


def expected_answers(demo: Path) -> list[str]:
    """What a session continues the conversation with, as jinja2 writes it."""
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    messages = [{"role": "system", "content": SYSTEM}]
    answers = []
    with load(demo) as session:
        for text in ASKED:
            messages.append({"role": "user", "content": text})
            prompt = template.render(messages=messages, add_generation_prompt=True)
            session.reset()
            answers.append("".join(generate_text(session, prompt, TOKENS)))
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("name", [host_target().name, "cortex-a78", "riscv64-rvv"])
def test_a_chat_continues_what_was_said_on_every_target(
    demo: Path, chat_bundle: Path, name: str, tmp_path: Path
) -> None:
    target = Target.load(name)
    emulator = static_emulator(target)
    (program,) = build_programs(demo, [name], tmp_path, names=["run"])
    assert program.stat().st_size < 400_000
    lines = "".join(f"{text}\n" for text in ASKED)
    said = output_of([*emulator, program], chat_bundle, ["--chat", "--system", SYSTEM], lines)
    assert said == "".join(f"{answer}\n" for answer in expected_answers(demo))


def test_python_chats_as_the_device_does(
    native: Path,
    chat_bundle: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agree(native, chat_bundle, ["--chat", "--prompt", ASKED[1]], capfd)
    lines = "".join(f"{text}\n" for text in ASKED)
    chat = ["--chat", "--system", SYSTEM, "--json", "--stop", "\n", "--repetition-penalty", "1.2"]
    ours = output_of([native], chat_bundle, chat, lines)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capfd.readouterr()
    assert main(["run", str(chat_bundle), "--max-tokens", str(TOKENS), *chat]) == 0
    assert ours == capfd.readouterr().out
    found = [json.loads(line) for line in ours.splitlines()]
    assert [f["text"] for f in found] == list(ASKED)
    assert not any("\n" in f["generated"] for f in found)


def test_a_turn_computes_what_is_new_alone(chat_bundle: Path, demo: Path) -> None:
    with load(chat_bundle) as session:
        talk = Conversation(session, SYSTEM)
        said = ["".join(talk.answer(ASKED[0], TOKENS))]
        assert talk.kept == 0
        before = session.position
        said += ["".join(talk.answer(text, TOKENS)) for text in ASKED[1:]]
        # All of the turn before but for what begins another message where an answer might go on.
        assert talk.kept > before
    assert said == expected_answers(demo)


def test_a_template_that_devices_do_not_have_is_run_by_python(
    native: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "counts.slm"
    bundle.mkdir()
    for file in demo.iterdir():
        (bundle / file.name).symlink_to(file)
    run = ["run", str(bundle), "--max-tokens", "4", "--chat", "--prompt", "f(x)"]
    assert main(run) == 1
    assert "the bundle has no chat template" in capfd.readouterr().err
    counts = "{% for m in messages %}# {{ loop.length }}\ndef {{ m.content }}:{% endfor %}"
    pieces = compile_chat(ChatTemplate(counts, {}))
    assert pieces.reason is not None
    (bundle / "chat.json").write_bytes(pieces.to_json())
    refused = subprocess.run([native, *run[1:]], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "the model's chat template is not compiled" in refused.stderr
    capfd.readouterr()
    assert main(run) == 0
    with load(demo) as session:
        assert capfd.readouterr().out == "".join(generate_text(session, "# 1\ndef f(x):", 4)) + "\n"
    (bundle / "chat.json").write_text('{"between": 3}')
    assert main(run) == 1
    assert "chat.json: is no chat template" in capfd.readouterr().err


ARGUMENTS = {
    "JSON": ["--prompt", PROMPTS[1], "--json"],
    "two stops": ["--prompt", PROMPTS[0], "--stop", "zzz", "--stop", "e"],
    "a stop that comes in parts": ["--prompt", PROMPTS[0], "--stop", "\n    ", "--json"],
    "biases": ["--prompt", PROMPTS[0], "--logit-bias", "5:9", "--logit-bias", "77:-3.5"],
    "penalties": [
        "--prompt", PROMPTS[0], "--frequency-penalty", "0.5", "--presence-penalty", "1",
        "--repetition-penalty", "1.3",
    ],
    "draws": ["--prompt", PROMPTS[0], "--temperature", "0.9", "--top-k", "40", "--seed", "7"],
}  # fmt: skip


@pytest.mark.parametrize("what", ARGUMENTS)
def test_a_prompt_is_continued_as_python_continues_it(
    native: Path, demo: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    agree(native, demo, ARGUMENTS[what], capfd)


def test_each_line_of_a_file_is_a_prompt(
    native: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("for key\tin items:\n\nnaïve = '🐍':\n")
    said = agree(native, demo, ["--file", str(file)], capfd)
    assert said.startswith("for key\tin items:")
    agree(native, demo, ["--file", str(file), "--json"], capfd)
