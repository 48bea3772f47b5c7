"""What turns text into a model's tokens, as it lies beside ONNX files."""

from slmtvm.text.chat import chat_pieces
from slmtvm.text.compiled import compile_tokenizer
from slmtvm.text.find import find_tokenizer, read_tokenizer

__all__ = ["chat_pieces", "compile_tokenizer", "find_tokenizer", "read_tokenizer"]
