"""Mixtures of experts as exporters take them: a loop over all experts, not over those hit.

transformers wrote the loop so until 4.52, and optimum still puts it back; the loop over the experts
that the example happened to hit cannot be exported.
"""

from __future__ import annotations

import torch
import transformers as hf

TRANSFORMERS_5 = int(hf.__version__.split(".")[0]) >= 5


def loop_over_all_experts(model: hf.PreTrainedModel) -> None:
    """Give the blocks of Mixtral, Qwen2-MoE and Qwen3-MoE that forward; other models stay.

    transformers 5 computes experts as batched products, which are exported as they are.
    """
    if TRANSFORMERS_5:
        return
    for module in model.modules():
        name = type(module).__name__
        if name in ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"):
            if name == "MixtralSparseMoeBlock":
                module.norm_topk_prob = True  # it always norms the weights of the chosen
            module.forward = _Loop(module)


class _Loop:
    def __init__(self, block: torch.nn.Module) -> None:
        self.block = block

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from optimum.exporters.onnx.model_patcher import qwen3_moe_forward_patched

        output, logits = qwen3_moe_forward_patched(self.block, hidden_states)
        if hasattr(self.block, "shared_expert"):
            gate = torch.sigmoid(self.block.shared_expert_gate(hidden_states))
            output = output + gate * self.block.shared_expert(hidden_states)
        return output, logits
