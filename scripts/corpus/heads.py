"""Heads on a model of any kind: what is asked of transformers, and the outputs that come."""

from __future__ import annotations

from dataclasses import dataclass

import transformers as hf


@dataclass(frozen=True)
class Head:
    """``auto``: the class that has it; ``outputs``: how torch's exporters are to name its own;
    ``labels``: how many it is made with; ``task``: optimum's name, "" where it has none."""

    auto: type
    outputs: tuple[str, ...]
    labels: int
    task: str


# Families that are made with every head, those with scores of their last token, and those whose
# encoder and decoder both read the text and which score its end token.
HEADED = ("bert", "distilbert", "roberta", "albert", "electra", "modernbert", "mpnet")
SCORED = ("gpt2", "llama", "qwen3")
BOTH_HALVES = ("bart", "t5")
HEADS = {
    "sequence": Head(hf.AutoModelForSequenceClassification, ("logits",), 3, "text-classification"),
    "token": Head(hf.AutoModelForTokenClassification, ("logits",), 5, "token-classification"),
    "span": Head(
        hf.AutoModelForQuestionAnswering, ("start_logits", "end_logits"), 2, "question-answering"
    ),
    # The mean of visible rows, its length 1, beside the rows themselves.
    "embedding": Head(hf.AutoModel, ("token_embeddings", "sentence_embedding"), 2, ""),
}
