"""Run a compiled bundle on text: generate, classify, embed, and what else its model does."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmtvm.cli.arguments import add_constraint, add_threads, positive
from slmtvm.errors import SlmError
from slmtvm.task import POOLINGS, TASKS

if TYPE_CHECKING:
    from slmtvm.runtime import Session
    from slmtvm.runtime.constraint import Constraint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the bundle, x.slm")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", help="the text: to continue, to classify, to embed, ...; the question to answer"
    )
    texts.add_argument(
        "--file", type=Path, metavar="FILE",
        help="a text in each line, of a pair with a tab between both",
    )  # fmt: skip
    parser.add_argument(
        "--pair", action="append", metavar="TEXT",
        help="the other text: what a reranker scores for the prompt (may be given several times), "
        "or what the answer stands in",
    )  # fmt: skip
    parser.add_argument(
        "--task", choices=TASKS, help="what the model is for (default: what its outputs say)"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object for each text")
    parser.add_argument(
        "--top", type=positive, default=5, help="most labels or fills to print (default 5)"
    )
    parser.add_argument(
        "--pool", choices=POOLINGS,
        help="how rows of tokens become an embedding (default: as the graph, or the model's "
        "settings, have it, else mean)",
    )  # fmt: skip
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction,
        help="make the length of embeddings 1 (default: as the model's settings say)",
    )  # fmt: skip
    parser.add_argument(
        "--chat", action="store_true",
        help="answer by the model's chat template: --prompt, or each line of the input",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with")
    _add_generation(parser)
    add_threads(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start", type=int, metavar="ID",
        help="the token that an encoder-decoder's text starts from (default: what the "
        "model's settings say, or padding)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive, default=64, help="most tokens to generate (default 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=0.0, help="only the likeliest tokens of this probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="only tokens at least this fraction as likely"
    )
    parser.add_argument("--seed", type=int, help="makes a random choice repeatable")
    for name, help in (
        ("repetition", "divides the logits of tokens in the context (above 1: fewer repeats)"),
        ("presence", "taken from the logits of tokens that were written"),
        ("frequency", "taken from them as often as they were"),
    ):
        parser.add_argument(f"--{name}-penalty", type=float, default=0.0, metavar="X", help=help)
    parser.add_argument(
        "--logit-bias", type=_bias, action="append", default=[], metavar="ID:X",
        help="added to the logit of a token (may be given several times)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text (may be given several times)",
    )  # fmt: skip
    add_constraint(parser, required=False)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    return int(token), float(bias)


def run(options: argparse.Namespace) -> int:
    from slmtvm.runtime import load
    from slmtvm.runtime.tasks import task_of

    if options.prompt is None and options.file is None and not options.chat:
        raise SlmError("no text: give --prompt, --file, or --chat to read the input")
    with load(options.bundle, threads=options.threads, cores=options.cores) as session:
        usual = task_of(session.info)
        task = "generate" if options.chat else options.task or usual
        if task == "generate" and usual != task:
            raise SlmError(f"this model writes no text; what it is for is --task {usual}")
        if task == "generate":
            with _constraint(session, options) as constraint:
                if options.chat:
                    _chat(session, options, constraint)
                    return 0
                for prompt, _ in _texts(options, "\n"):
                    session.reset()
                    _generate(session, prompt, options, constraint)
            return 0
        texts = list(_texts(options))
        _note(session, task, options)
        for text, pair in texts:
            result = _result(session, task, text, pair, options)
            if options.json:
                said = {"text": text, **({} if pair is None else {"pair": pair}), **result}
                print(json.dumps(said, ensure_ascii=False))
                continue
            if len(texts) > 1:
                print(text if pair is None else f"{text}\t{pair}")
            for line in _LINES[task](result):
                print(f"  {line}" if len(texts) > 1 else line)
    return 0


def _texts(options: argparse.Namespace, between: str = "\t") -> Iterator[tuple[str, str | None]]:
    """The texts to run, each with its pair if it has one, in a file ``between`` both."""
    if options.file is None:
        for pair in options.pair or [None]:
            yield options.prompt, pair
        return
    if options.pair:
        raise SlmError("a pair goes with --prompt; in a file it stands behind a tab")
    try:
        lines = options.file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SlmError(f"not a readable UTF-8 text: {error}", where=str(options.file)) from error
    for line in filter(None, lines):
        text, found, pair = line.partition(between)
        yield text, pair if found else None


def _result(
    session: Session, task: str, text: str, pair: str | None, options: argparse.Namespace
) -> dict[str, Any]:
    """What the task makes of a text, as JSON types."""
    from slmtvm.runtime import tasks

    if task == "classify":
        labels = tasks.classify(session, text, pair)[: options.top]
        return {"labels": [asdict(label) for label in labels]}
    if task == "answer":
        if pair is None:
            raise SlmError("this model answers a question from a text: give the text with --pair")
        return {"answer": asdict(tasks.answer(session, text, pair))}
    if pair is not None:
        raise SlmError(f"a pair is given, and the task ({task}) takes one text")
    if task == "entities":
        return {"entities": [asdict(entity) for entity in tasks.entities(session, text)]}
    if task == "fill":
        fills = tasks.fill(session, text, options.top)
        return {"fills": [[asdict(f) for f in of_mask] for of_mask in fills]}
    embedding = tasks.embed(session, text, pooling=options.pool or "", normalize=options.normalize)
    return {"embedding": [float(value) for value in embedding.values]}


def _score_lines(result: dict[str, Any]) -> Iterator[str]:
    for label in result["labels"]:
        yield f"{label['score']:9.4f}  {label['label']}"


def _entity_lines(result: dict[str, Any]) -> Iterator[str]:
    for e in result["entities"]:
        yield f"{e['score']:9.4f}  {e['label']}  {e['start']}-{e['end']}  {e['text']}"


def _answer_lines(result: dict[str, Any]) -> Iterator[str]:
    a = result["answer"]
    yield f"{a['score']:9.4f}  {a['start']}-{a['end']}  {a['text']}"


def _fill_lines(result: dict[str, Any]) -> Iterator[str]:
    for number, of_mask in enumerate(result["fills"]):
        place = f"  mask {number + 1}" if len(result["fills"]) > 1 else ""
        for f in of_mask:
            yield f"{f['score']:9.4f}  {f['text']}{place}"


def _embedding_lines(result: dict[str, Any]) -> Iterator[str]:
    yield " ".join(f"{value:.6g}" for value in result["embedding"])


_LINES = {
    "classify": _score_lines,
    "entities": _entity_lines,
    "answer": _answer_lines,
    "fill": _fill_lines,
    "embed": _embedding_lines,
}


def _note(session: Session, task: str, options: argparse.Namespace) -> None:
    """Say what a user would not expect of an embedding."""
    from slmtvm.runtime.tasks import pools_itself

    settings = session.info.get("task", {})
    if task != "embed" or pools_itself(session.info) or options.pool:
        return
    if missing := settings.get("missing"):
        words = ", ".join(missing)
        print(f"slmtvm: modules.json asks for {words} too, which is left out", file=sys.stderr)
    if not settings.get("pooling"):
        print("slmtvm: the mean of the tokens' rows: choose with --pool", file=sys.stderr)


@contextmanager
def _constraint(session: Session, options: argparse.Namespace) -> Iterator[Constraint | None]:
    if options.json_schema is None and options.choices is None and options.regex is None:
        yield None
        return
    from slmtvm.constrain import constrain

    opened = session.constraint(
        constrain(
            session.bundle,
            json_schema=options.json_schema,
            choices=options.choices,
            regex=options.regex,
        )
    )
    try:
        yield opened
    finally:
        opened.close()


def _sampling(options: argparse.Namespace, constraint: Constraint | None) -> dict[str, Any]:
    names = (
        "temperature", "top_k", "top_p", "min_p", "seed", "start", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "stop",
    )  # fmt: skip
    chosen = {name: getattr(options, name) for name in names}
    return {**chosen, "logit_bias": dict(options.logit_bias), "constraint": constraint}


def _generate(
    session: Session, prompt: str, options: argparse.Namespace, constraint: Constraint | None
) -> None:
    from slmtvm.runtime.text import generate_text

    started = time.perf_counter()
    pieces = generate_text(session, prompt, options.max_tokens, **_sampling(options, constraint))
    before = prompt if session.info["kind"] == "decoder" else ""
    _write(prompt, before, pieces, options)
    seconds = time.perf_counter() - started
    if not options.quiet and not options.json:
        those = " with the prompt's" if before else ""
        print(f"[{session.position} tokens{those} in {seconds:.2f} s]", file=sys.stderr)


def _chat(session: Session, options: argparse.Namespace, constraint: Constraint | None) -> None:
    from slmtvm.runtime.chat import Conversation

    if options.file is not None:
        raise SlmError("a chat reads the input, or --prompt")
    conversation = Conversation(session, options.system)
    sampling = _sampling(options, constraint)
    for text in _messages(options):
        _write(text, "", conversation.answer(text, options.max_tokens, **sampling), options)


def _messages(options: argparse.Namespace) -> Iterator[str]:
    if options.prompt is not None:
        yield options.prompt
        return
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if text := line.removesuffix("\n"):
            yield text


def _write(text: str, before: str, pieces: Iterator[str], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"text": text, "generated": "".join(pieces)}, ensure_ascii=False))
        return
    sys.stdout.write(before)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
