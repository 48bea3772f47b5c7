"""Texts of tokens that are bytes, streamed on devices: what decoding at once gives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from slmtvm.bundle import Bundle
from slmtvm.codegen.program import kept_program
from slmtvm.compiler import compile_model
from slmtvm.runtime import load
from slmtvm.runtime.serving import server_program
from slmtvm.runtime.text import end_tokens
from slmtvm.target import host_target
from tests.codegen.programs.serving import client_of, serving
from tests.importer.heads import DECODERS, VOCAB, save_head
from tests.shared_folder import made_once

pytestmark = pytest.mark.slow
TOKENS, SEEDS = 30, range(12)
PROMPT = "b hello 中"
WORDS = ["<unk>", "<s>", "</s>", "▁", "▁hello", "▁world", "b", "▁a", "中", "é"]
# Parts of é, 中 and 🐍, bytes that are no UTF-8, and others: whatever is drawn has rows of them.
BYTES = sorted({*"é中🐍".encode(), 0xFF, 0xC0, 0x80, 0x0A, *range(0xE2, 0xF0), *range(0x90, 0xBC)})


def tokenizer_of_bytes() -> Tokenizer:
    """That of Llama 2 and its kin: what it has no token for is written in bytes."""
    words = [*WORDS, *(f"<0x{byte:02X}>" for byte in BYTES)][:VOCAB]
    assert len(words) == VOCAB
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        model = save_head(DECODERS["last_logits"], folder)
        tokenizer_of_bytes().save(str(folder / "tokenizer.json"))
        compile_model(model, output=folder / "bytes.slm")

    return made_once(tmp_path_factory, "streaming", make) / "bytes.slm"


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[str]:
    """By seed, what `tokenizers` makes of all tokens at once."""
    texts = []
    with load(bundle) as session:
        tokenizer, stop = session.tokenizer, end_tokens(session)
        ids = tokenizer.encode(PROMPT).ids
        before = tokenizer.decode(ids)
        for seed in SEEDS:
            session.reset()
            drawn = list(session.generate(ids, TOKENS, temperature=3, seed=seed, stop=stop))
            whole = tokenizer.decode([*ids, *drawn])
            assert whole.startswith(before)
            texts.append(whole[len(before) :])
    assert any("\ufffd" in text for text in texts) and len(set(texts)) > len(SEEDS) // 2
    return texts


def test_slm_run_streams_what_decoding_at_once_gives(bundle: Path, expected: list[str]) -> None:
    program = kept_program(Bundle.open(bundle), host_target().name, "run")
    for seed, text in zip(SEEDS, expected, strict=True):
        result = subprocess.run(
            [program, bundle, "--prompt", PROMPT, "--temperature", "3", "--seed", str(seed),
             "--max-tokens", str(TOKENS)], capture_output=True,
        )  # fmt: skip
        assert result.stdout.decode() == f"{PROMPT}{text}\n", seed


def test_slm_serve_streams_what_decoding_at_once_gives(bundle: Path, expected: list[str]) -> None:
    with serving(server_program(bundle), bundle) as server, client_of(server) as client:
        for seed, text in zip(SEEDS, expected, strict=True):
            asked = {"prompt": PROMPT, "temperature": 3, "seed": seed, "max_tokens": TOKENS}
            events = client.completions.create(model="bytes", stream=True, **asked)
            assert "".join(event.choices[0].text for event in events) == text, seed
            whole = client.completions.create(model="bytes", **asked)
            assert whole.choices[0].text == text
