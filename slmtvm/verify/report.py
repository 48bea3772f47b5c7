"""What a verification found, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slmtvm.verify.agreement import Figures, Limits, finite
from slmtvm.verify.exits import ExitReport


@dataclass(frozen=True)
class VerifyReport(Figures):
    """How a bundle's output differs from onnxruntime's on the same ONNX file.

    Logits for a decoder, hidden states for an encoder. The perplexities are None for encoders and
    where no text was given, since the tokens compared are then random.
    """

    ppl: float | None = None
    ppl_reference: float | None = None
    masked: VerifyReport | None = None  # visible tokens under masks, where the bundle takes any
    rounded_layers: int = 0  # whose activations the bundle rounds to int8, but the file does not
    own: Figures | None = None  # onnxruntime's difference from itself, where it was measured
    # The bundle's and onnxruntime's difference from a float model, where there is one.
    from_float: Figures | None = None
    reference_from_float: Figures | None = None
    exits: ExitReport | None = None  # where the bundle has early exits, and it is evaluated here
    notes: tuple[str, ...] = ()  # what may be wrong with onnxruntime's numbers

    def to_json(self) -> dict[str, Any]:
        """The object that ``slmtvm verify --json`` writes: no number in it is not finite."""
        table: dict[str, Any] = {
            "tokens": self.tokens,
            "max_abs": self.max_abs,
            "mean_abs": self.mean_abs,
            "relative": self.relative,
            "cosine": self.cosine,
            "rounded_layers": self.rounded_layers,
        }
        if self.kl_mean is not None:
            table |= {
                "kl_mean": self.kl_mean,
                "top1": self.top1,
                "ppl": self.ppl,
                "ppl_reference": self.ppl_reference,
            }
        table = {key: finite(value) for key, value in table.items()}
        for key, figures in (
            ("own", self.own),
            ("from_float", self.from_float),
            ("reference_from_float", self.reference_from_float),
            ("masked", self.masked),
        ):
            if figures is not None:
                table[key] = figures.to_json()
        if self.exits is not None:
            table["exits"] = self.exits.to_json()
        if self.notes:
            table["notes"] = list(self.notes)
        return table

    def excess(self, limits: Limits, own: Figures | None = None) -> list[str]:
        """What is beyond both its limit and onnxruntime's difference from itself, under masks too.

        A sentence's part for each measure; nothing where the outputs agree.
        """
        found = super().excess(limits, own or self.own)
        under = self.masked.excess(limits) if self.masked else []
        return found + [f"under masks: {part}" for part in under]

    def agrees(self, limits: Limits | None = None) -> bool:
        """Whether the difference is within the limits, or as small as onnxruntime's from itself."""
        return not self.excess(limits or Limits())

    def __str__(self) -> str:
        lines = self._lines()
        if self.masked is not None:
            lines.append("under masks, visible tokens:")
            lines += [f"  {line}" for line in self.masked._lines()]
        if self.exits is not None:
            lines.append(str(self.exits))
        if self.rounded_layers:
            lines.append(
                f"note: {self.rounded_layers} layers round activations to int8 where the file asks "
                "for float32; --activations file compiles what it asks for"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _lines(self) -> list[str]:
        lines = [
            f"tokens compared      {self.tokens}",
            f"largest difference   {self.max_abs:.3g}, {self.relative:.2g} of the range",
            f"mean difference      {self.mean_abs:.3g}",
            f"cosine               {self.cosine:.6f}",
        ]
        if self.kl_mean is not None and self.top1 is not None:
            lines.append(f"KL divergence        {self.kl_mean:.3g} nats")
            lines.append(f"same top-1 token     {100 * self.top1:.2f} %")
        if self.ppl is not None and self.ppl_reference is not None:
            lines.append(f"perplexity           {self.ppl:.4f}")
            lines.append(f"  of onnxruntime     {self.ppl_reference:.4f}")
        for title, figures in (
            ("onnxruntime from itself", self.own),
            ("bundle from the float model", self.from_float),
            ("onnxruntime from the float model", self.reference_from_float),
        ):
            if figures is not None:
                lines.append(f"{title}: {summary(figures)}")
        return lines


def summary(figures: Figures) -> str:
    """The figures that outputs are judged by, in one line."""
    kl = "" if figures.kl_mean is None else f"KL divergence {figures.kl_mean:.2g} nats, "
    return (
        f"{kl}cosine {figures.cosine:.5f}, largest difference {figures.relative:.2g} of the range"
    )
