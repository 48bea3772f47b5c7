"""What pruning changed, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmtvm.quantize.accuracy import Accuracy


@dataclass(frozen=True)
class PrunedLayer:
    """One layer: its weight (k, n), and how much of it is zero now.

    ``weight_error`` and ``output_error`` are fractions of the root mean square: of the weight, and
    of the layer's output on the calibration tokens, its input being exact; None without tokens.
    ``dense``: it was left as it is, because it would have cost most.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    weight_error: float
    output_error: float | None
    dense: bool = False


@dataclass(frozen=True)
class PruneReport:
    """A pruned file beside the one that it was made from."""

    output: Path
    pattern: str
    method: str
    layers: tuple[PrunedLayer, ...]
    accuracy: Accuracy

    @property
    def zeros(self) -> float:
        """Of the weights of all layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        weighted = zip(self.layers, sizes, strict=True)
        return sum(layer.zeros * size for layer, size in weighted) / sum(sizes)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {**asdict(self), "output": str(self.output), "zeros": self.zeros}

    def __str__(self) -> str:
        rows = [("zeros", "k x n", "weight error", "output error", "layer")]
        for layer in self.layers:
            k, n = layer.shape
            name = f"{layer.name} (left dense)" if layer.dense else layer.name
            rows.append(
                (f"{layer.zeros:.0%}", f"{k} x {n}", _percent(layer.weight_error),
                 _percent(layer.output_error), name)
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.append(f"{self.output}: {self.zeros:.1%} of the weights of {len(self.layers)} layers")
        found = self.accuracy
        if found.ppl_before is not None and found.ppl_after is not None:
            lines.append(
                f"PERPLEXITY {found.ppl_before:.2f} before, {found.ppl_after:.2f} after pruning "
                f"({found.ppl_after / found.ppl_before:.2f} times); KL divergence {found.kl:.3g} "
                f"nats, on {found.tokens} tokens"
            )
        elif found.cosine is not None:
            lines.append(f"cosine of hidden states {found.cosine:.6f}, on {found.tokens} tokens")
        else:
            lines.append("what this costs was NOT measured: give a text with --calibration")
        return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
