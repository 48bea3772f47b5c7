"""slm-run prints of labels, answers, fills and embeddings what `slmtvm run` prints."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from slmtvm.bundle import Bundle
from slmtvm.cli.main import main
from slmtvm.codegen.program import kept_program
from slmtvm.compiler import compile_model
from slmtvm.target import host_target
from tests.codegen.sanitized import gcc, objects
from tests.importer.graph_builder import GraphBuilder
from tests.importer.heads import DIM, ENCODERS, LABELS, MOST, VOCAB, Head, save_head
from tests.shared_folder import made_once

pytestmark = pytest.mark.slow
SANITIZERS = "address,undefined"
SPECIAL = ["[CLS]", "[SEP]", "[MASK]"]
WORDS = ["größe", "漢字", "🐍", "the", "robot", "moves"]
TEXT = "the robot moves 漢字 w7 🐍 w9"


def every_task(b: GraphBuilder, x: str) -> dict[str, tuple[str, list[str | int]]]:
    """Outputs that serve all tasks but labels of whole texts."""
    start, end = (b.op("Squeeze", b.op("MatMul", x, b.weight(DIM, 1)), b.ints(2)) for _ in range(2))
    outputs = {
        "logits": (b.op("MatMul", x, b.weight(DIM, VOCAB)), ["seq", VOCAB]),
        "start_logits": (start, ["seq"]),
        "end_logits": (end, ["seq"]),
    }
    return {
        **outputs,
        "sentence_embedding": ENCODERS["mean_embedding"].build(b, x)["sentence_embedding"],
    }


EVERY = Head(
    every_task,
    ("logits", "start_logits", "end_logits", "sentence_embedding"),
    frozenset({"sentence_embedding"}),
)


def save_tokenizer(folder: Path) -> None:
    words = [*WORDS, *(f"w{i}" for i in range(VOCAB - len(WORDS) - len(SPECIAL))), *SPECIAL]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", VOCAB - 3), ("[SEP]", VOCAB - 2)],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))


def compiled(factory: pytest.TempPathFactory, name: str, head: Head, labels: list[str]) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        model = save_head(head, folder, types="table")
        save_tokenizer(folder)
        names = {str(i): label for i, label in enumerate(labels)}
        (folder / "config.json").write_text(json.dumps({"id2label": names}))
        compile_model(model, output=folder / "x.slm")

    return made_once(factory, f"run-tasks-{name}", make) / "x.slm"


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tags = ["O", "B-PER", "I-PER", "LOC", 'so "so"', *(f"I-X-{i % 3}" for i in range(VOCAB - 5))]
    return compiled(tmp_path_factory, "every", EVERY, tags)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["bad", "größer", "good"]
    assert len(names) == LABELS
    return compiled(tmp_path_factory, "labels", ENCODERS["classifier"], names)


def slm_run(bundle: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    program = kept_program(Bundle.open(bundle), host_target().name, "run")
    return subprocess.run(
        [program, bundle, *arguments], input=text, capture_output=True, text=True
    )  # fmt: skip


def agree(bundle: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What both print of the same arguments, which is the same."""
    result = slm_run(bundle, *arguments)
    capfd.readouterr()
    assert main(["run", str(bundle), *arguments]) == 0
    said = capfd.readouterr()
    assert (result.returncode, result.stdout) == (0, said.out), result.stderr
    noted = [line.replace("slmtvm: ", "slm-run: ") for line in said.err.splitlines()]
    assert result.stderr.splitlines() == noted
    return said.out


LONG = " ".join(f"w{i % 40}" for i in range(3 * MOST)) + " 漢字 the robot"
ARGUMENTS = {
    "entities": ["--task", "entities", "--prompt", TEXT],
    "entities as JSON": ["--task", "entities", "--prompt", TEXT, "--json"],
    "an answer": ["--prompt", "w3 größe", "--pair", TEXT],
    "an answer as JSON": ["--prompt", "größe", "--pair", TEXT, "--json"],
    "an answer in windows": ["--prompt", "w3 größe w5", "--pair", LONG, "--json"],
    "fills": ["--task", "fill", "--prompt", "w3 [MASK] robot"],
    "fills of two": ["--task", "fill", "--prompt", "w3 [MASK] [MASK]", "--top", "3"],
    "fills as JSON": ["--task", "fill", "--prompt", "[MASK] w3 [MASK]", "--json"],
    "the embedding": ["--task", "embed", "--prompt", TEXT],
    "the embedding as JSON": ["--task", "embed", "--prompt", TEXT, "--json"],
    **{
        f"rows pooled by {how}": ["--task", "embed", "--prompt", TEXT, "--pool", how, "--json"]
        for how in ("mean", "weightedmean", "first", "last", "max")
    },
    "rows of length 1": [
        "--task", "embed", "--prompt", TEXT, "--pool", "max", "--normalize", "--json",
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", ARGUMENTS)
def test_what_a_model_makes_of_a_text_is_printed_as_python_prints_it(
    every: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(agree(every, ARGUMENTS[what], capfd)) > 10


def test_labels_of_texts_pairs_and_lines_are_printed_as_python_prints_them(
    labels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--prompt", "w7", "--pair", "w9 w4", "--pair", "größe"]
    agree(labels, ["--prompt", TEXT], capfd)
    agree(labels, ["--prompt", TEXT, "--json", "--top", "2"], capfd)
    agree(labels, [*pairs, "--top", "1"], capfd)
    agree(labels, [*pairs, "--json"], capfd)
    texts = tmp_path / "texts.txt"
    texts.write_text(f"w7\tw9 w4\r\n\n{TEXT}\rw5", newline="")
    lines = agree(labels, ["--file", str(texts)], capfd).splitlines()
    assert lines[0] == "w7\tw9 w4" and lines[LABELS + 1] == TEXT
    agree(labels, ["--file", str(texts), "--json"], capfd)
    given = slm_run(labels, text=f"w7\tw9 w4\n\n{TEXT}\nw5")
    assert given.stdout.splitlines() == lines


def _wrong(every: Path, labels: Path, folder: Path) -> Iterator[tuple[Path, list[str], str]]:
    (folder / "no.txt").write_bytes(b"a\xff\n")
    (folder / "w.txt").write_text("w1\n")
    yield every, ["--prompt", "w1"], "give the text with --pair"
    yield every, ["--prompt", "w1", "--task", "generate"], "what it is for is --task answer"
    yield every, ["--prompt", "w1", "--chat"], "what it is for is --task answer"
    yield every, ["--prompt", "w1 " * MOST, "--pair", "w1"], "66 tokens, which do not fit"
    yield every, ["--prompt", "w1 " * (MOST - 3), "--pair", "w1"], "no text fits the context of"
    yield every, ["--prompt", "w1", "--pair", ""], "the text is empty: there is nothing to find"
    yield every, ["--task", "fill", "--prompt", "w1"], "no mask to fill ([MASK])"
    yield every, ["--task", "fill", "--prompt", "w1", "--pair", "w1"], "(fill) takes one text"
    yield every, ["--task", "embed", "--prompt", os.fsdecode(b"\xff")], "it is no valid text"
    yield labels, ["--prompt", "w1 " * 99], "101 tokens, which do not fit the context of"
    yield labels, ["--file", str(folder / "no.txt")], "no.txt: not a"
    yield labels, ["--file", str(folder / "none.txt")], "none.txt: not a readable"
    yield labels, ["--file", str(folder / "w.txt"), "--pair", "w1"], "behind a tab"


def test_what_is_wrong_is_said_in_the_words_of_python(
    every: Path, labels: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for bundle, arguments, message in _wrong(every, labels, tmp_path):
        result = slm_run(bundle, *arguments)
        capfd.readouterr()
        assert main(["run", str(bundle), *arguments]) == 1
        assert (result.returncode, result.stdout) == (1, ""), arguments
        assert message in result.stderr and message in capfd.readouterr().err, result.stderr


def test_the_sanitizers_find_nothing(
    every: Path, chat_bundle: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def checked(bundle: Path) -> Path:
        model = bundle / "lib" / f"{host_target().name}.o"
        program = tmp_path / f"slm-run.{bundle.stem}"
        gcc(SANITIZERS, [*made, str(model), "-lm", "-pthread", "-o", program.name], tmp_path)
        return program

    made = [
        *objects(tmp_path_factory, SANITIZERS, "runtime"),
        *objects(tmp_path_factory, SANITIZERS, "programs", "run*.c"),
        *objects(tmp_path_factory, SANITIZERS, "programs", "shared_*.c"),
    ]
    program = checked(every)
    for arguments in ARGUMENTS.values():
        result = subprocess.run([program, every, *arguments], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, ""), arguments
    lines = "f(x)\n" + "long " * 900 + "\ng()\n"  # the second does not fit
    chat = [checked(chat_bundle), chat_bundle, "--chat", "--stop", "e", "--stop", "\n", "--json"]
    result = subprocess.run(chat, input=lines, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout.startswith('{"text": "f(x)", "generated": "')
    assert result.stderr.startswith("slm-run: error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sing"], "--task cannot be sing"),
        (["--pool", "sum"], "--pool cannot be sum"),
        (["--top", "0"], "--top cannot be 0"),
        (["--logit-bias", "3"], "--logit-bias cannot be 3"),
        (["--stop", ""], "--stop cannot be"),
        (["--prompt", "a", "--file", "b"], "--prompt or --file, not both"),
    ],
)
def test_values_that_cannot_be_are_refused(
    labels: Path, arguments: list[str], message: str
) -> None:
    result = slm_run(labels, *arguments)
    assert result.returncode == 64 and message in result.stderr
