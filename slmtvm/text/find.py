"""Where a model's tokenizer lies, and in which of the forms that exporters write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slmtvm.errors import InvalidModelError
from slmtvm.files import no_such_file, read_file
from slmtvm.text.sentencepiece import convert_sentencepiece
from slmtvm.text.settings import MAX_TOKENIZER_BYTES
from slmtvm.text.vocabulary import convert_bpe, convert_wordpiece

_ONNX_FOLDER = "onnx"  # in which hubs keep the ONNX files, below what all formats share
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


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
    """What a tokenizer.json of the tokenizer ``path`` holds: such a file, or one to convert.

    That is a vocab.txt (WordPiece), a vocab.json beside a merges.txt (BPE of bytes), a
    SentencePiece .model, or a folder with one of these; the settings beside it say what they leave
    open. Raises InvalidModelError where it is none of these, or is of a kind that is not converted.
    """
    path = Path(path)
    if path.is_dir():
        found = _in_folder(path)
        if found is None:
            raise InvalidModelError(
                "holds no tokenizer: no tokenizer.json, vocab.txt, vocab.json with merges.txt or "
                "SentencePiece .model",
                where=str(path),
            )
        path = found
    if not path.exists():
        raise InvalidModelError(no_such_file(path), where=str(path))
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    if path.suffix == ".txt":
        text = convert_wordpiece(path)
    elif path.name == "vocab.json":
        text = convert_bpe(path)
    elif path.suffix == ".model":
        text = convert_sentencepiece(path)
    else:
        content = read_file(path, MAX_TOKENIZER_BYTES, InvalidModelError)
        _check(content, path)
        return content
    return text.encode()


def _in_folder(folder: Path) -> Path | None:
    names = ["tokenizer.json", "vocab.json", "vocab.txt", *_SENTENCEPIECE]
    for name in names:
        file = folder / name
        if file.is_file() and (name != "vocab.json" or (folder / "merges.txt").is_file()):
            return file
    return None


def _check(content: bytes, path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise InvalidModelError(f"not a tokenizer.json: {error}", where=str(path)) from error
