"""Where a model's tokenizer lies, and in which of the forms that exporters write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slmtvm.errors import InvalidModelError
from slmtvm.files import no_such_file, read_file

MAX_TOKENIZER_BYTES = 256 << 20
_ONNX_FOLDER = "onnx"  # in which hubs keep the ONNX files, below what all formats share


def model_folders(model: str | Path) -> Iterator[Path]:
    """Where a model's settings and its tokenizer may lie: beside it, or above a folder "onnx"."""
    folder = Path(model).parent
    yield folder
    if folder.absolute().name == _ONNX_FOLDER:
        yield folder / ".." if folder == Path() else folder.parent


def find_tokenizer(model: str | Path) -> Path | None:
    """The file of the tokenizer of the ONNX file ``model``; None where there is none."""
    for folder in model_folders(model):
        if (found := _in_folder(folder)) is not None:
            return found
    return None


def read_tokenizer(path: str | Path) -> bytes:
    """What the tokenizer.json ``path``, or the one in the folder ``path``, holds.

    Raises InvalidModelError where it is none.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path)
        if found is None:
            raise InvalidModelError(
                "holds no tokenizer.json",
                where=str(path),
            )
        path = found
    if not path.exists():
        raise InvalidModelError(no_such_file(path), where=str(path))
    content = read_file(path, MAX_TOKENIZER_BYTES, InvalidModelError)
    _check(content, path)
    return content


def _in_folder(folder: Path) -> Path | None:
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def _check(content: bytes, path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise InvalidModelError(f"not a tokenizer.json: {error}", where=str(path)) from error
