"""Task heads on sentences with padding on either side: a bundle's rows beside onnxruntime's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corpus.agreement import Agreement, Rule, compare
from corpus.inputs import Sentence, Side, padded
from corpus.outputs import side_by_side, their_rows
from slmtvm.ir.model import CanonicalModel
from slmtvm.runtime import Session
from slmtvm.verify import Reference

_OTHER_PADDING = 21  # a token like others


class PaddedSentences:
    """``sequences`` (n,) of tokens for a file, which is given them with padding."""

    def __init__(
        self, path: Path, model: CanonicalModel, rule: Rule, sequences: Sequence[np.ndarray]
    ) -> None:
        self._reference, self._model, self._rule = Reference(path), model, rule
        self._sequences = sequences
        # What a file must be given where that moves its positions; any token is padding elsewhere.
        pads = model.padding if model.mask == "skip" else ()
        self._token = pads[0] if pads else None

    @property
    def sides(self) -> tuple[Side, ...]:
        """Where there may be padding. A decoder's last token is none; without a mask of its own a
        bundle knows its sentences' lengths alone."""
        if not self._reference.takes_mask:
            return ()
        left: tuple[Side, ...] = () if self._model.mask == "none" else ("left",)
        return left if self._model.kind == "decoder" else (*left, "right")

    def compare(self, session: Session, side: Side) -> Agreement | None:
        """Rows of what is no padding, and what is pooled.

        Of the sentences alone, where onnxruntime's rows depend on what the padding is: a scale of
        all tokens of a call counts it, and a range that was calibrated without padding holds no
        score that would hide it. None where no sentence stands alone as it stands behind padding.
        """
        ours = [self._ours(session, padded(x, side, self._token)) for x in self._sequences]
        if not self._rule.stepwise:
            agreement = self._judged(ours, self._theirs(side, self._token))
            if agreement.holds or not self._is_seen(side):
                return agreement
        moves = side == "left" and self._model.mask != "skip"
        return None if moves else self._judged(ours, self._alone())

    def _judged(self, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Agreement:
        return compare(self._rule, ours, theirs, self._model.outputs)

    def _is_seen(self, side: Side) -> bool:
        """Whether other padding changes onnxruntime's rows, or any does that is the only one."""
        rows = self._theirs(side, self._token)
        if self._token is not None:
            return not self._judged(self._alone(), rows).holds
        return not self._judged(self._theirs(side, _OTHER_PADDING), rows).holds

    def _alone(self) -> list[np.ndarray]:
        outputs = self._model.outputs
        return [their_rows(self._reference, x, None, outputs) for x in self._sequences]

    def _theirs(self, side: Side, token: int | None) -> list[np.ndarray]:
        names = [output.name for output in self._model.outputs]
        found = []
        for tokens in self._sequences:
            sentence = padded(tokens, side, token)
            values = self._reference.run(sentence.tokens, names, mask=sentence.visible)
            found.append(self._seen(values, sentence))
        return found

    def _ours(self, session: Session, sentence: Sentence) -> np.ndarray:
        if self._model.kind == "decoder":
            session.reset()
        values = session.outputs(sentence.tokens, sentence.visible)
        return self._seen([*values.values()], sentence)

    def _seen(self, values: Sequence[np.ndarray], sentence: Sentence) -> np.ndarray:
        """``side_by_side`` without the rows of padding."""
        rows = side_by_side(self._model.outputs, values, len(sentence.tokens))
        return rows if len(rows) != len(sentence.tokens) else rows[sentence.visible]
