"""slm-run, a static program with the model inside, writes the text that `slmtvm run` writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from slmtvm.bundle import Bundle
from slmtvm.codegen.program import build_programs
from slmtvm.constrain import constrain
from slmtvm.errors import BundleError
from slmtvm.runtime import load
from slmtvm.runtime.text import generate_text
from slmtvm.target import Target, host_target
from tests.emulation.session import static_emulator
from tests.end_to_end.bundles import TARGETS_OF_THREE, bundle_for
from tests.models import PROMPTS

pytestmark = pytest.mark.slow
TOKENS = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_for(tmp_path_factory, "demo", TARGETS_OF_THREE)


def command(bundle: Path, target: Target, folder: Path) -> list[str]:
    """slm-run of ``target`` on this machine, emulated where that is needed."""
    emulator = static_emulator(target)
    (program,) = build_programs(bundle, [target.name], folder, names=["run"])
    assert program.stat().st_size < 400_000
    return [*emulator, str(program), str(bundle)]


def expected_text(bundle: Path, prompt: str) -> str:
    with load(bundle) as session:
        return prompt + "".join(generate_text(session, prompt, TOKENS)) + "\n"


def test_a_prompt_is_continued_as_python_continues_it(bundle: Path, tmp_path: Path) -> None:
    run = command(bundle, host_target(), tmp_path)  # other targets: programs/test_run_chat.py
    result = subprocess.run(
        [*run, "--prompt", PROMPTS[1], "--max-tokens", str(TOKENS), "--stats"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected_text(bundle, PROMPTS[1])
    assert f"written: {TOKENS} tokens" in result.stderr


def test_a_constraint_is_followed_as_python_follows_it(bundle: Path, tmp_path: Path) -> None:
    far = {"type": "number", "minimum": 0, "maximum": 9}
    properties = {"go": {"enum": ["left", "right"]}, "far": far}
    schema = {"type": "object", "properties": properties, "required": ["go"]}
    made = constrain(bundle, json_schema=schema, output=tmp_path / "command.slmc")
    run = command(bundle, host_target(), tmp_path)
    result = subprocess.run(
        [*run, "--prompt", PROMPTS[0], "--max-tokens", str(TOKENS), "--constraint",
         str(tmp_path / "command.slmc"), "--frequency-penalty", "0.5", "--presence-penalty", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with load(bundle) as session, closing(session.constraint(made)) as constraint:
        penalties = {"frequency_penalty": 0.5, "presence_penalty": 1.0}
        text = "".join(
            generate_text(session, PROMPTS[0], TOKENS, constraint=constraint, **penalties)
        )
    assert result.stdout == f"{PROMPTS[0]}{text}\n"
    assert json.loads(text)["go"] in ("left", "right")
    refused = subprocess.run(
        [*run, "--prompt", "x", "--max-tokens", "2", "--constraint", tmp_path / "command.slmc"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 1
    assert f"at least {made.least_tokens} tokens, and 2 may come" in refused.stderr


def test_each_line_of_the_input_is_a_prompt(bundle: Path, tmp_path: Path) -> None:
    run = command(bundle, host_target(), tmp_path)
    prompts = ["for key in items:", "naïve = '🐍':"]
    result = subprocess.run(
        [*run, "--max-tokens", str(TOKENS)], input="\n".join(prompts), capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.stdout == "".join(expected_text(bundle, prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "usage: slm-run BUNDLE"),
        (["{bundle}", "--max-tokens", "0"], 64, "--max-tokens cannot be 0"),
        (["{bundle}", "--prompt"], 64, "--prompt needs a value"),
        (["{bundle}", "--colour", "x"], 64, "there is no option --colour"),
        (["{bundle}", "--prompt", ""], 1, "the prompt is empty"),
        (["{bundle}", "--prompt", "x " * 400], 1, "context"),
        (["/no/bundle", "--prompt", "x"], 1, "/no/bundle/weights.bin: cannot open"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    bundle: Path, arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    program, _ = command(bundle, host_target(), tmp_path)
    given = [argument.format(bundle=bundle) for argument in arguments]
    result = subprocess.run([program, *given], capture_output=True, text=True)
    assert result.returncode == code
    assert message in result.stderr


def test_a_program_has_the_same_bytes_each_time_and_needs_no_loader(
    bundle: Path, tmp_path: Path
) -> None:
    made = [build_programs(bundle, ["cortex-a78"], tmp_path / n)[0].read_bytes() for n in "ab"]
    assert made[0] == made[1]
    assert b"ld-linux" not in made[0] and b"ld-musl" not in made[0]


def test_a_changed_object_is_not_linked(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.slm"
    shutil.copytree(bundle, copy)
    file = copy / "lib" / "cortex-a78.o"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"cortex-a78\.o: damaged or changed"):
        build_programs(copy, ["cortex-a78"], tmp_path)
    with pytest.raises(BundleError, match="no library for target 'x'"):
        build_programs(copy, ["x"], tmp_path)
    assert Bundle.open(bundle).targets == tuple(sorted(TARGETS_OF_THREE))
