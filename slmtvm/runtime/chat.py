"""A conversation with a model: its texts by the model's chat template, what was said kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from slmtvm.errors import BundleError, SlmError
from slmtvm.files import read_text
from slmtvm.runtime.text import continue_tokens
from slmtvm.text.chat import ChatPieces, Message

if TYPE_CHECKING:
    from slmtvm.bundle import Bundle
    from slmtvm.runtime.session import Session

_MAX_BYTES = 8 << 20  # of codegen/programs/shared_chat.c, too


class Conversation:
    """What a session and its user say in turns.

    Each answer continues all that was said before, of which the session keeps what it can: a turn
    computes what is new. Nothing else may use the session meanwhile.
    """

    def __init__(self, session: Session, system: str | None = None) -> None:
        """Begin one, with a message of the ``system`` role if there is one.

        Raises SlmError where the bundle has no chat template, BundleError where it is damaged.
        """
        self.messages: list[Message] = []
        self._session = session
        self._template = bundle_chat(session.bundle)
        self._known: list[int] = []  # what the session's context begins with
        self.kept = 0  # tokens of the last answer's prompt that the session had already
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        session.reset()

    def answer(self, text: str, max_tokens: int = 64, **options: Any) -> Iterator[str]:
        """What the model answers to ``text``, piece by piece; options: of ``generate_text``.

        The answer counts as said once it was read to its end. Raises SlmError where the template
        does not take the text, or the conversation does not fit the context.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a command line may hold any bytes
            raise SlmError(f"the message is no valid text: {text!r}") from error
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        tokenizer, session = self._session.tokenizer, self._session
        ids = tokenizer.encode(self._template.prompt(asked), add_special_tokens=False).ids
        self.kept = 0
        if session.info["kind"] != "encoder-decoder":
            # The last token is evaluated in any case, for its logits.
            most = min(len(self._known), session.position, len(ids) - 1)
            while self.kept < most and self._known[self.kept] == ids[self.kept]:
                self.kept += 1
            session.seek(self.kept)
        self._known = list(ids)
        heard = self._known.append
        pieces = continue_tokens(session, ids, max_tokens, known=self.kept, heard=heard, **options)

        def spoken() -> Iterator[str]:
            said = []
            for piece in pieces:
                said.append(piece)
                yield piece
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

        return spoken()


def bundle_chat(bundle: Bundle) -> ChatPieces:
    """The chat template of a bundle.

    Raises SlmError where it has none, BundleError where chat.json is damaged.
    """
    path = bundle.path / "chat.json"
    if not path.is_file():
        raise SlmError(
            "the bundle has no chat template: none lay beside the model", where=f"{path}"
        )
    try:
        return ChatPieces.from_json(read_text(path, _MAX_BYTES, BundleError))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(
            f"is no chat template: {error}; compile again", where=f"{path}"
        ) from error
