"""What quantizing changed, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerError:
    """One layer: its weight (k, n), and errors as fractions of the root mean square.

    ``weight_error``: of the weight itself. ``output_error``: of the layer's output on the
    calibration tokens, its input being exact. None where the method or the lack of tokens leaves it
    unknown.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    weight_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class QuantizeReport:
    """A quantized file beside the one that it was made from.

    Perplexities are of a decoder on the calibration tokens, ``kl`` the mean KL divergence
    (original || quantized) in nats, ``cosine`` of an encoder's hidden states; None where they have
    no meaning or no tokens were given.
    """

    output: Path
    method: str
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerError, ...]
    tokens: int = 0
    ppl_before: float | None = None
    ppl_after: float | None = None
    kl: float | None = None
    cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**asdict(self), "output": str(self.output)}

    def __str__(self) -> str:
        rows = [("bits", "k x n", "weight error", "output error", "layer")]
        for layer in self.layers:
            k, n = layer.shape
            rows.append(
                (str(layer.bits), f"{k} x {n}", _percent(layer.weight_error),
                 _percent(layer.output_error), layer.name)
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        ratio = self.bytes_after / self.bytes_before
        lines.append(
            f"{self.output}: {self.bytes_after:,} bytes, {ratio:.0%} of {self.bytes_before:,}"
        )
        if self.ppl_before is not None and self.ppl_after is not None:
            lines.append(
                f"perplexity {self.ppl_before:.4f} before, {self.ppl_after:.4f} after, "
                f"KL divergence {self.kl:.3g} nats, on {self.tokens} tokens"
            )
        if self.cosine is not None:
            lines.append(f"cosine of hidden states {self.cosine:.6f}, on {self.tokens} tokens")
        return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"
