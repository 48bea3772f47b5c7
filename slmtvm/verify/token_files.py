"""Files that tokens are read from: a text, or token ids in a .npy file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slmtvm import files
from slmtvm.errors import SlmError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MOST_BYTES = 1 << 30


def read_ids(path: Path) -> npt.NDArray[np.integer[Any]]:
    """The integers (n,) or (windows, n) of a .npy file; SlmError where it holds none."""
    content = files.read_file(path, _MOST_BYTES)
    try:
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SlmError(f"not a .npy file of token ids: {error}", where=str(path)) from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise SlmError(f"holds {what}; integers (n,) or (windows, n) are needed", where=str(path))
    return ids


def read_text(path: Path) -> str:
    """A UTF-8 text as it stands: no newline is translated, which is one token more or less."""
    return files.read_text(path, _MOST_BYTES)


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids int32 (n,) of the whole text, whatever padding the tokenizer is set to."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return np.array(tokenizer.encode(text).ids, np.int32)
