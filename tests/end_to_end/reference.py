"""onnxruntime on the user's own file: the oracle of the end-to-end tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnxruntime as ort

from slmtvm.verify.exact_sums import exact_session
from tests.models import model_path


@dataclass(frozen=True)
class Reference:
    """A decoder's ONNX file under onnxruntime, its graph left as it is."""

    session: ort.InferenceSession

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits float32 (n, vocab) of tokens (n,), evaluated at once without a cache."""
        n = len(tokens)
        feeds: dict[str, np.ndarray] = {}
        for given in self.session.get_inputs():
            if given.name == "input_ids":
                feeds[given.name] = np.asarray(tokens, np.int64)[None]
            elif given.name == "attention_mask":
                feeds[given.name] = np.ones((1, n), np.int64)
            elif given.name == "position_ids":
                feeds[given.name] = np.arange(n)[None]
            else:
                feeds[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        return self.session.run(["logits"], feeds)[0][0]

    def greedy(self, prompt: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
        """The ``count`` most likely tokens after ``prompt``, and each one's lead over the next."""
        tokens, leads = list(prompt), []
        for _ in range(count):
            last = self.logits(np.array(tokens))[-1]
            second, first = np.partition(last, -2)[-2:]
            leads.append(float(first - second))
            tokens.append(int(last.argmax()))
        return tokens[len(prompt) :], leads


@lru_cache(maxsize=3)
def reference(form: str) -> Reference:
    """The oracle of one of the demo model's forms."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    return Reference(exact_session(model_path(form), options))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities in float64 over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_kl(reference_logits: np.ndarray, logits: np.ndarray) -> float:
    """Mean over rows of KL(reference || model), in nats."""
    p, q = log_softmax(reference_logits), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    """exp of the mean negative log likelihood of targets (n,) under logits (n, vocab)."""
    nll = -log_softmax(logits)[np.arange(len(targets)), targets]
    return float(np.exp(nll.mean()))
