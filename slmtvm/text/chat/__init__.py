"""A model's chat template: run by jinja2, and compiled to what stands between messages."""

from slmtvm.text.chat.compile import chat_pieces, compile_chat
from slmtvm.text.chat.items import Message, Tool
from slmtvm.text.chat.pieces import ChatPieces
from slmtvm.text.chat.template import ChatTemplate, find_chat_template

__all__ = [
    "ChatPieces",
    "ChatTemplate",
    "Message",
    "Tool",
    "chat_pieces",
    "compile_chat",
    "find_chat_template",
]
