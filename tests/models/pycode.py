"""The demo model's own files: where they lie, its held-out text and the prompts of the tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "pycode-6m"
TOKENIZER = DEMO / "tokenizer.json"
HELDOUT = DEMO / "heldout.txt"

# They end at a colon: the tokenizer joins a newline with the indentation after it, so a prompt that
# ends in a bare newline says that an unindented line comes.
PROMPTS = (
    "def read_file(path):",
    "    try:\n        with open(filename) as f:",
    "import os\nimport sys\n\n\ndef main():",
    "class Queue:\n    def __init__(self, maxsize=0):",
    "for key, value in sorted(items):",
)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@cache
def heldout_ids() -> np.ndarray:
    """The held-out text as int32 (55041,) = 215 windows of 256 and one token more."""
    text = HELDOUT.read_bytes().decode()
    return np.array(_tokenizer().encode(text).ids, np.int32)


@cache
def prompt_ids() -> tuple[tuple[int, ...], ...]:
    """Token ids of each of PROMPTS."""
    return tuple(tuple(_tokenizer().encode(prompt).ids) for prompt in PROMPTS)
