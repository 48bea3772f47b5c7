"""Older releases of the exporters, whose files are what many people have.

Each needs an environment of its own, without slmtvm, which making the corpus does not need:

    pip install -r scripts/corpus/requirements/transformers-4.31.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers as hf

from corpus.families import Family


@dataclass(frozen=True)
class Release:
    """``environment`` names the file of requirements; the others are versions, "" for none."""

    environment: str
    optimum: str
    builder: str = ""
    knows_groups: bool = True  # whether optimum exports fewer key and value heads than query heads

    @property
    def is_here(self) -> bool:
        """Whether the interpreter's environment is this one."""
        return f"transformers-{hf.__version__}".startswith(f"{self.environment}.")


RELEASES = (
    Release("transformers-4.31", optimum="1.11", knows_groups=False),
    Release("transformers-4.38", optimum="1.17"),
    Release("transformers-4.45", optimum="1.23", builder="0.5"),
)


def as_known(release: Release, family: Family) -> Family:
    """The family with the sizes that its exporter of the time took."""
    return replace(family, configuration=partial(_configuration, release, family))


def _configuration(release: Release, family: Family) -> hf.PretrainedConfig:
    config = family.configuration()
    if not release.knows_groups and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads
    if family.kind == "decoder" and getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


@contextmanager
def traced() -> Iterator[None]:
    """torch.onnx.export by tracing where the caller does not say: what it did at the time."""
    export = torch.onnx.export
    torch.onnx.export = partial(export, dynamo=False)
    try:
        yield
    finally:
        torch.onnx.export = export
