"""Families whose models are pruned before they are exported, by whatever route.

Every matrix has another pattern; of the first layer a head and some channels are gone.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers as hf

from corpus.families import FAMILIES, family, llama
from corpus.pruned import cut, prune

_CHANNELS = slice(40, 72)  # of the first layer, that are gone


def _matrices(model: hf.PreTrainedModel) -> dict[str, np.ndarray]:
    """The layers' weights (n, k), views of the model's memory."""
    table, found = model.get_input_embeddings().weight, {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or weight is table:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = weight.detach().numpy()
        elif isinstance(module, hf.pytorch_utils.Conv1D):
            found[name] = weight.detach().numpy().T
    return found


def _with_bias(model: hf.PreTrainedModel, names: list[str]) -> list[np.ndarray]:
    """Weights and biases of layers."""
    weights = _matrices(model)
    found = [weights[name] for name in names]
    biases = [getattr(model.get_submodule(name), "bias", None) for name in names]
    return found + [bias.detach().numpy() for bias in biases if bias is not None]


def _prune_llama(model: hf.PreTrainedModel) -> None:
    weights, dim = _matrices(model), model.config.head_dim
    prune(weights)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    head = slice(dim, 2 * dim)
    cut([weights[f"{attention}.q_proj"]], [weights[f"{attention}.o_proj"]], head)
    makers = [weights[f"{mlp}.gate_proj"], weights[f"{mlp}.up_proj"]]
    cut(makers, [weights[f"{mlp}.down_proj"]], _CHANNELS)


def _prune_bert(model: hf.PreTrainedModel) -> None:
    weights = _matrices(model)
    dim = model.config.hidden_size // model.config.num_attention_heads
    prune(weights)
    layer = next(n for n in weights if n.endswith("layer.0.attention.self.query"))
    layer = layer.removesuffix(".attention.self.query")
    makers = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    readers = [weights[f"{layer}.attention.output.dense"]]
    cut(_with_bias(model, makers), readers, slice(dim, 2 * dim))
    makers = _with_bias(model, [f"{layer}.intermediate.dense"])
    cut(makers, [weights[f"{layer}.output.dense"]], _CHANNELS)


def _prune_gpt2(model: hf.PreTrainedModel) -> None:
    weights = _matrices(model)
    prune(weights)
    width, heads = model.config.n_embd, model.config.n_head
    dim = width // heads
    layer = next(n for n in weights if n.endswith("h.0.attn.c_attn")).removesuffix(".attn.c_attn")
    for part in range(3):  # queries, keys and values
        made = slice(part * width + dim, part * width + 2 * dim)
        cut(_with_bias(model, [f"{layer}.attn.c_attn"]), [], made)
    cut([], [weights[f"{layer}.attn.c_proj"]], slice(dim, 2 * dim))
    makers = _with_bias(model, [f"{layer}.mlp.c_fc"])
    cut(makers, [weights[f"{layer}.mlp.c_proj"]], _CHANNELS)


@family("decoder", name="llama-pruned", prune=_prune_llama)
def _llama() -> hf.PretrainedConfig:
    return llama()


@family("decoder", name="gpt2-pruned", prune=_prune_gpt2)
def _gpt2() -> hf.PretrainedConfig:
    config = FAMILIES["gpt2"].configuration()
    config.n_head = 4
    return config


@family("encoder", name="bert-pruned", token_types=True, prune=_prune_bert)
def _bert() -> hf.PretrainedConfig:
    config = FAMILIES["bert"].configuration()
    config.num_attention_heads = 4
    return config
