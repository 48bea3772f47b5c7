"""Each verb does its work on the real demo model."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import slmtvm
from slmtvm.bundle import Bundle
from slmtvm.bundle.manifest import FORMAT
from slmtvm.cli.verify import DISAGREES
from slmtvm.runtime.text import generate_text
from tests.cli.command import ROOT
from tests.cli.command import slmtvm as command
from tests.models import HELDOUT, PROMPTS, model_path
from tests.models.corpus import corpus_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--temperature", "0.9", "--seed", "7"), ("--temperature", "2", "--top-k", "1")],
    ids=" ".join,
)
def test_run_prints_what_the_python_call_yields(bundle: Path, options: tuple[str, ...]) -> None:
    result = command("run", bundle, "--prompt", PROMPTS[0], "--max-tokens", "24", *options)
    assert result.returncode == 0, result.stderr
    names = (name.removeprefix("--").replace("-", "_") for name in options[::2])
    sampling = dict(zip(names, (float(value) for value in options[1::2]), strict=True))
    with slmtvm.load(bundle) as session:
        pieces = generate_text(
            session,
            PROMPTS[0],
            24,
            temperature=sampling.get("temperature", 0.0),
            top_k=int(sampling.get("top_k", 0)),
            seed=int(sampling.get("seed", 0)),
        )
        assert result.stdout == PROMPTS[0] + "".join(pieces) + "\n"


@pytest.mark.slow
def test_run_gives_the_same_text_for_every_number_of_threads(bundle: Path) -> None:
    arguments = ("run", bundle, "--prompt", PROMPTS[1], "--max-tokens", "24")
    one, three = (command(*arguments, "--threads", threads) for threads in ("1", "3"))
    assert one.stdout == three.stdout
    assert len(one.stdout) > len(PROMPTS[1]) + 24


@pytest.mark.slow
def test_run_writes_what_a_schema_a_regex_or_choices_allow(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 2}')
    schema = command("run", bundle, "--prompt", "x =", "--json-schema", file, "--json")
    assert schema.returncode == 0, schema.stderr
    assert len(json.loads(json.loads(schema.stdout)["generated"])) >= 2
    choices = command("run", bundle, "--prompt", "x =", "--choices", "stop,go,turn left")
    assert choices.stdout.removeprefix("x =") in ("stop\n", "go\n", "turn left\n")
    made = command("constraint", bundle, "--regex", "[a-f]{3}", "-o", tmp_path / "r.slmc")
    assert made.returncode == 0 and "at least 1 tokens a text" in made.stdout
    assert (tmp_path / "r.slmc").read_bytes()[:7] == b"SLMCONS"
    file.write_text('{"type": "array", "uniqueItems": true}')
    refused = command("constraint", bundle, "--json-schema", file, "-o", "x")
    assert refused.returncode == 1 and "uniqueItems is not compiled" in refused.stderr


@pytest.mark.slow
def test_run_ends_before_a_stop_string(bundle: Path) -> None:
    whole = command("run", bundle, "--prompt", PROMPTS[0], "--max-tokens", "24").stdout
    written = whole.removeprefix(PROMPTS[0])
    stop = written[9:14]
    cut = command("run", bundle, "--prompt", PROMPTS[0], "--max-tokens", "24", "--stop", stop)
    assert cut.stdout == PROMPTS[0] + written[: written.index(stop)] + "\n"


@pytest.mark.slow
def test_run_needs_no_compiler(bundle: Path) -> None:
    code = (
        "import sys\nfrom slmtvm.cli.main import main\n"
        f"assert main(['run', {str(bundle)!r}, '--prompt', 'def f(x):']) == 0\n"
        "assert not {'tvm', 'onnx', 'onnxruntime', 'ziglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_cleanly(bundle: Path) -> None:
    arguments = ["run", str(bundle), "--prompt", PROMPTS[0], "--max-tokens", "1000"]
    # A pipe that is full once the prompt is printed: the run cannot end before the signal.
    reading, writing = os.pipe()
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writing, b" " * (size - len(PROMPTS[0])))
    process = subprocess.Popen(
        [sys.executable, "-m", "slmtvm.cli", *arguments],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore the signal, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    os.close(writing)
    while int.from_bytes(fcntl.ioctl(reading, termios.FIONREAD, bytes(4)), sys.byteorder) < size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    with os.fdopen(reading) as output:
        printed = output.read()
    _, errors = process.communicate(timeout=60)
    assert printed.lstrip(" ").startswith(PROMPTS[0])
    assert process.returncode == 130
    assert errors.strip() == ""


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_a_run_without_a_traceback(bundle: Path) -> None:
    arguments = ["run", str(bundle), "--prompt", PROMPTS[0], "--max-tokens", "1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slmtvm.cli", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ("import " * 2000, "context"),
        (b"\xff\xfe".decode(errors="surrogateescape"), "no valid text"),
    ],
    ids=["empty", "too long", "no UTF-8"],
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    bundle: Path, prompt: str, words: str
) -> None:
    result = command("run", bundle, "--prompt", prompt)
    assert result.returncode == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_verify_compares_on_a_text_and_writes_json(bundle: Path, tmp_path: Path) -> None:
    text, numbers = tmp_path / "text", tmp_path / "numbers.json"
    text.write_bytes(HELDOUT.read_bytes()[-8000:])
    result = command(
        "verify", bundle, model_path("demo"), "--text", text, "--json", numbers, "--windows", "4"
    )
    assert result.returncode == 0, result.stderr
    table = json.loads(numbers.read_text())
    measured = ["kl_mean", "top1", "ppl", "ppl_reference"]
    assert set(table) > {"tokens", "max_abs", "mean_abs", "relative", "cosine", "own", *measured}
    assert table["rounded_layers"] == 0
    assert 0 < table["kl_mean"] < 0.01
    assert table["ppl"] == pytest.approx(table["ppl_reference"], rel=0.01)
    assert f"perplexity           {table['ppl']:.4f}" in result.stdout


@pytest.mark.slow
def test_verify_without_a_text_reports_no_perplexity(bundle: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    result = command("verify", bundle, model_path("demo"), "--json", numbers)
    assert result.returncode == 0, result.stderr
    table = json.loads(numbers.read_text())
    assert (table["ppl"], table["ppl_reference"]) == (None, None)


@pytest.mark.slow
def test_verify_fails_for_the_bundle_of_another_model(bundle: Path) -> None:
    text = ("--text", HELDOUT, "--windows", "4")
    result = command("verify", bundle, model_path("float32"), *text)
    assert result.returncode == DISAGREES
    assert "differs from onnxruntime" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["run", "bench", "verify"])
def test_a_bundle_of_another_format_is_refused_in_one_line(
    bundle: Path, tmp_path: Path, verb: str
) -> None:
    old = shutil.copytree(bundle, tmp_path / "old.slm")
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    arguments = {"run": ("--prompt", "x"), "bench": (), "verify": (model_path("demo"),)}[verb]
    result = command(verb, old, *arguments)
    assert result.returncode == 1
    assert (
        f"bundle format 1, this slmtvm reads format {FORMAT}; compile the model again"
        in result.stderr
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_masks_are_compiled_reported_and_verified(tmp_path: Path) -> None:
    model, path, numbers = corpus_path("bert-optimum"), tmp_path / "x.slm", tmp_path / "n.json"
    compiled = command("compile", model, "-o", path, "--context", "64", "--mask", "arbitrary")
    assert compiled.returncode == 0, compiled.stderr
    assert "context 64 tokens, masks (keys)" in compiled.stdout
    verified = command("verify", path, model, "--json", numbers)
    assert verified.returncode == 0, verified.stderr
    assert "under masks, visible tokens:" in verified.stdout
    assert json.loads(numbers.read_text())["masked"]["cosine"] > 0.9999
    assert json.loads((path / "manifest.json").read_text())["model"]["mask"] == "keys"


@pytest.mark.slow
def test_a_mask_that_cannot_be_compiled_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    options = ("-o", tmp_path / "x.slm", "--mask", "arbitrary")
    result = command("compile", model_path("demo"), *options)
    assert result.returncode == 1
    assert "no input is a mask of the tokens (attention_mask)" in result.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_inspect_tells_what_was_recognised() -> None:
    result = command("inspect", model_path("demo"))
    assert result.returncode == 0, result.stderr
    for word in ("llama", "6 (8 heads, 4 kv heads, head_dim 32)", "4096", "1024", "int4 group 32"):
        assert word in result.stdout


@pytest.mark.slow
def test_compile_puts_several_targets_into_one_bundle(tmp_path: Path) -> None:
    path = tmp_path / "two.slm"
    targets = ("--target", "x86-64-v3", "--target", "cortex-a72", "--context", "64")
    result = command("compile", model_path("demo"), *targets, "-o", path)
    assert result.returncode == 0, result.stderr
    assert "context 64 tokens" in result.stdout
    assert {library.stem for library in (path / "lib").glob("*.so")} == {"x86-64-v3", "cortex-a72"}


@pytest.mark.slow
def test_a_cache_of_lower_rank_is_compiled_and_says_what_it_costs(tmp_path: Path) -> None:
    path, text = tmp_path / "rank.slm", tmp_path / "some.txt"
    text.write_text(HELDOUT.read_text()[:2000])
    options = ("--context", "64", "--kv", "rank:16,int8", "--kv-calibration", text, "-o", path)
    result = command("compile", model_path("demo"), *options, "--no-check")
    assert result.returncode == 0, result.stderr
    assert "KV cache of rank 16 (of 32), 50% of its numbers: on" in result.stdout
    assert "layer 1: rank " in result.stdout
    record = Bundle.open(path).manifest.extra["kv_rank"]
    assert record["rank"] == 16 and 1 < record["ppl_whole"] < record["ppl"]
    model = Bundle.open(path).manifest.model
    assert (model["kv"], sum(model["kv_ranks"]), model["head_dim"]) == ("int8", 6 * 16, 32)


@pytest.mark.exhaustive
def test_a_lower_rank_that_the_check_refuses_is_said_to_be_the_reason(tmp_path: Path) -> None:
    path, text = tmp_path / "rank.slm", tmp_path / "some.txt"
    text.write_text(HELDOUT.read_text()[:2000])
    options = ("--context", "64", "--kv", "rank:16", "--kv-calibration", text, "-o", path)
    refused = command("compile", model_path("demo"), *options)
    assert refused.returncode == 3 and not path.exists()
    assert "keeps keys and values at a lower rank: a higher one is nearer" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv", "rank:16"), "name one with --kv-calibration"),
        pytest.param(
            ("--kv", "rank:32", "--kv-calibration", HELDOUT), "heads have 32 features",
            marks=pytest.mark.exhaustive,
        ),
        (("--kv", "rank:16,int9", "--kv-calibration", HELDOUT), "not 'int9'"),
    ],
)  # fmt: skip
def test_a_rank_that_cannot_be_is_one_line(
    options: tuple[str | Path, ...], words: str, tmp_path: Path
) -> None:
    result = command("compile", model_path("demo"), "-o", tmp_path / "x.slm", *options)
    assert result.returncode == 1 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "x.slm").exists()


@pytest.mark.slow
def test_exits_are_compiled_learned_from_a_text_and_verified(tmp_path: Path) -> None:
    path, text = tmp_path / "exits.slm", tmp_path / "some.txt"
    text.write_text(HELDOUT.read_text()[:2000])
    exits = ("--exit", "4,5", "--exit-calibration", text, "--exit-agreement", "0.3")
    options = ("-o", path, "--context", "64", "--no-check")
    result = command("compile", model_path("demo"), *exits, *options)
    assert result.returncode == 0, result.stderr
    assert "exit after layer 4: from a margin of" in result.stdout
    chosen = Bundle.open(path).manifest.extra["exits"]
    assert [made["exit"]["layer"] for made in chosen] == [4, 5]
    result = command("verify", path, model_path("demo"), "--text", text, "--windows", "1")
    assert "early exits: " in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--exit", "2"), "name one with --exit-calibration"),
        (("--exit", "9", "--exit-calibration", HELDOUT), "layer"),
    ],
)
def test_exits_that_cannot_be_are_refused_and_leave_nothing(
    options: tuple[str | Path, ...], said: str, tmp_path: Path
) -> None:
    result = command("compile", model_path("demo"), *options, "-o", tmp_path / "none.slm")
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())
