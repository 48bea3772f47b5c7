"""What a verification found, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VerifyReport:
    """How a bundle's output differs from onnxruntime's on the same ONNX file.

    Logits for a decoder, hidden states for an encoder. Where a number has no meaning it is None:
    ``cosine`` for decoders; ``kl_mean`` (nats, KL(reference || bundle)), ``top1`` (fraction of
    positions with the same most likely token) and the perplexities for encoders; the perplexities
    also where no text was given, since the tokens compared are then random.
    """

    kind: str  # "decoder" or "encoder"
    tokens: int
    max_abs: float
    mean_abs: float
    kl_mean: float | None = None
    top1: float | None = None
    ppl: float | None = None
    ppl_reference: float | None = None
    cosine: float | None = None
    masked: VerifyReport | None = None  # visible tokens under masks, where the bundle takes any
    rounded_layers: int = 0  # whose activations the bundle rounds to int8, but the file does not

    def to_json(self) -> dict[str, Any]:
        """The object that ``slmtvm verify --json`` writes."""
        common: dict[str, Any] = {
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "rounded_layers": self.rounded_layers,
        }
        if self.masked is not None:
            common["masked"] = self.masked.to_json()
        if self.kind == "encoder":
            return {**common, "cosine": self.cosine}
        return {
            **common,
            "kl_mean": self.kl_mean,
            "top1": self.top1,
            "ppl": self.ppl,
            "ppl_reference": self.ppl_reference,
        }

    def agrees(self, *, max_kl: float, min_cosine: float) -> bool:
        """Whether the difference stays within the bound of its kind; NaN does not."""
        if self.masked and not self.masked.agrees(max_kl=max_kl, min_cosine=min_cosine):
            return False
        if self.kind == "encoder":
            return self.cosine is not None and self.cosine >= min_cosine
        return self.kl_mean is not None and self.kl_mean <= max_kl

    def __str__(self) -> str:
        lines = self._lines()
        if self.masked is not None:
            lines.append("under masks, visible tokens:")
            lines += [f"  {line}" for line in self.masked._lines()]
        if self.rounded_layers:
            lines.append(
                f"note: {self.rounded_layers} layers round activations to int8 where the file asks "
                "for float32; --activations file compiles what it asks for"
            )
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        lines = [
            f"tokens compared      {self.tokens}",
            f"largest difference   {self.max_abs:.3g}",
            f"mean difference      {self.mean_abs:.3g}",
        ]
        if self.cosine is not None:
            lines.append(f"cosine               {self.cosine:.6f}")
        if self.kl_mean is not None and self.top1 is not None:
            lines.append(f"KL divergence        {self.kl_mean:.3g} nats")
            lines.append(f"same top-1 token     {100 * self.top1:.2f} %")
        if self.ppl is not None and self.ppl_reference is not None:
            lines.append(f"perplexity           {self.ppl:.4f}")
            lines.append(f"  of onnxruntime     {self.ppl_reference:.4f}")
        return lines
