"""Families of small language models: sizes awkward on purpose, weights random from a fixed seed.

One function a family; widths are no multiples of 16 or 32 where the family's exporters allow it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import transformers as hf

from corpus.experts import TRANSFORMERS_5
from corpus.heads import HEADS
from corpus.selection import split_name

Kind = Literal["decoder", "encoder", "encoder-decoder"]
_AUTO = {
    "decoder": hf.AutoModelForCausalLM,
    "encoder": hf.AutoModel,
    "encoder-decoder": hf.AutoModelForSeq2SeqLM,
}
_VECTOR_NOISE = 0.1  # on norms' scales and on biases, which are ones and zeros when initialized
# Matrices are multiples of this, so that files of them can be compressed.
GRID = 2.0**-7
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Family:
    """A family: its configuration, what kind of model it is and what its exporters need to know."""

    name: str
    kind: Kind
    configuration: Callable[[], hf.PretrainedConfig]
    token_types: bool = False  # an encoder that takes token_type_ids
    environment: str = (
        ""  # the one extra of pyproject.toml whose transformers has it; both if empty
    )
    prune: Callable[[hf.PreTrainedModel], None] | None = None  # what is done to its weights

    def model(self, attention: str = "sdpa", head: str = "") -> hf.PreTrainedModel:
        """The model in float32, with one of HEADS if any; its weights depend on the family's name
        and the head alone."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        config = self.configuration()
        auto = _AUTO[self.kind]
        if head:
            auto, config.num_labels = HEADS[head].auto, HEADS[head].labels
            if config.pad_token_id is None:
                config.pad_token_id = 2
        architecture = auto._model_mapping[type(config)]
        options = {}
        if hasattr(architecture, "_supports_sdpa"):  # older ones have the eager attention alone
            able = attention != "sdpa" or architecture._supports_sdpa
            options["attn_implementation"] = attention if able else "eager"
        if TRANSFORMERS_5:  # the default implementation of experts cannot be exported
            options["experts_implementation"] = "batched_mm"
        model = auto.from_config(config, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * _VECTOR_NOISE)
                else:
                    parameter.mul_(1 / GRID).round_().mul_(GRID)
            if self.prune is not None:
                self.prune(model)
        return model.eval()


def final_token(cell: str) -> int | None:
    """The token that every sequence of a cell's model must end with, if any: an encoder-decoder's
    head takes its row."""
    name = split_name(cell)
    known = FAMILIES[name.family]
    if not name.head or known.kind != "encoder-decoder":
        return None
    token: int = known.configuration().eos_token_id
    return token


def family(
    kind: Kind,
    *,
    name: str | None = None,
    token_types: bool = False,
    environment: str = "",
    prune: Callable[[hf.PreTrainedModel], None] | None = None,
) -> Callable[[Callable[[], hf.PretrainedConfig]], Callable[[], hf.PretrainedConfig]]:
    """Register a configuration under its function's name."""

    def register(
        configuration: Callable[[], hf.PretrainedConfig],
    ) -> Callable[[], hf.PretrainedConfig]:
        key = name or configuration.__name__
        FAMILIES[key] = Family(key, kind, configuration, token_types, environment, prune)
        return configuration

    return register


@family("decoder")
def gpt2() -> hf.PretrainedConfig:
    return hf.GPT2Config(
        vocab_size=211, n_embd=80, n_layer=2, n_head=2, n_inner=136, n_positions=101,
        initializer_range=0.12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


@family("decoder", name="gpt2-quickgelu")
def gpt2_quickgelu() -> hf.PretrainedConfig:
    config = gpt2()
    config.activation_function = "quick_gelu"
    return config


@family("decoder")
def llama() -> hf.PretrainedConfig:
    return hf.LlamaConfig(
        vocab_size=197, hidden_size=72, intermediate_size=152, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=48, max_position_embeddings=127,
        initializer_range=0.12, tie_word_embeddings=False, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def smollm() -> hf.PretrainedConfig:
    return hf.LlamaConfig(
        vocab_size=233, hidden_size=96, intermediate_size=168, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=127,
        initializer_range=0.12, tie_word_embeddings=True, rope_theta=100000.0, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def mistral() -> hf.PretrainedConfig:
    return hf.MistralConfig(
        vocab_size=199, hidden_size=88, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=112, max_position_embeddings=131,
        sliding_window=11, initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def qwen2() -> hf.PretrainedConfig:
    return hf.Qwen2Config(
        vocab_size=227, hidden_size=96, intermediate_size=152, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=113,
        initializer_range=0.12, tie_word_embeddings=True, use_sliding_window=False, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def qwen3() -> hf.PretrainedConfig:
    return hf.Qwen3Config(
        vocab_size=223, hidden_size=72, intermediate_size=120, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=80, max_position_embeddings=109,
        initializer_range=0.12, tie_word_embeddings=True, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def phi3() -> hf.PretrainedConfig:
    return hf.Phi3Config(
        vocab_size=193, hidden_size=96, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=107,
        original_max_position_embeddings=107, initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def gemma2() -> hf.PretrainedConfig:
    return hf.Gemma2Config(
        vocab_size=229, hidden_size=72, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=96, max_position_embeddings=127,
        sliding_window=9, query_pre_attn_scalar=72, attn_logit_softcapping=5.0,
        final_logit_softcapping=7.0, initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def gemma3() -> hf.PretrainedConfig:
    return hf.Gemma3TextConfig(
        vocab_size=251, hidden_size=88, intermediate_size=120, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=48, max_position_embeddings=127,
        sliding_window=9, query_pre_attn_scalar=56, initializer_range=0.12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_TOKENS,
    )  # fmt: skip


@family("decoder")
def opt() -> hf.PretrainedConfig:
    return hf.OPTConfig(
        vocab_size=191, hidden_size=80, ffn_dim=136, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=97, word_embed_proj_dim=80, init_std=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def bloom() -> hf.PretrainedConfig:
    return hf.BloomConfig(
        vocab_size=181, hidden_size=72, n_layer=2, n_head=3, initializer_range=0.12, **_TOKENS
    )


@family("decoder", name="gpt-neox")
def gpt_neox() -> hf.PretrainedConfig:
    return hf.GPTNeoXConfig(
        vocab_size=179, hidden_size=80, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=2, rotary_pct=0.25, max_position_embeddings=103,
        initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder")
def mixtral() -> hf.PretrainedConfig:
    return hf.MixtralConfig(
        vocab_size=173, hidden_size=80, intermediate_size=104, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=48, max_position_embeddings=127,
        num_local_experts=4, num_experts_per_tok=2, initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder", name="qwen2-moe")
def qwen2_moe() -> hf.PretrainedConfig:
    return hf.Qwen2MoeConfig(
        vocab_size=167, hidden_size=80, intermediate_size=104, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=127,
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=56,
        shared_expert_intermediate_size=72, decoder_sparse_step=1, initializer_range=0.12,
        **_TOKENS,
    )  # fmt: skip


@family("decoder", name="qwen3-moe")
def qwen3_moe() -> hf.PretrainedConfig:
    return hf.Qwen3MoeConfig(
        vocab_size=149, hidden_size=72, intermediate_size=104, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=40, max_position_embeddings=127,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=56, norm_topk_prob=True,
        initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("decoder", name="lfm2-moe", environment="peer-models")
def lfm2_moe() -> hf.PretrainedConfig:
    # QMoE takes experts in blocks of 32 at least.
    return hf.Lfm2MoeConfig(
        vocab_size=163, hidden_size=96, intermediate_size=160, moe_intermediate_size=64,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=127, num_dense_layers=1, num_experts=4, num_experts_per_tok=2,
        conv_L_cache=3, layer_types=["conv", "full_attention", "conv"], use_expert_bias=True,
        initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("encoder", token_types=True)
def bert() -> hf.PretrainedConfig:
    return hf.BertConfig(
        vocab_size=149, hidden_size=80, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=101, initializer_range=0.12,
    )  # fmt: skip


@family("encoder")
def distilbert() -> hf.PretrainedConfig:
    return hf.DistilBertConfig(
        vocab_size=151, dim=72, hidden_dim=152, n_layers=1, n_heads=3,
        max_position_embeddings=89, initializer_range=0.12,
    )  # fmt: skip


@family("encoder", token_types=True)
def tinybert() -> hf.PretrainedConfig:
    # 26 lanes a head, as the published one has.
    return hf.BertConfig(
        vocab_size=157, hidden_size=78, intermediate_size=150, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=83, initializer_range=0.12,
    )  # fmt: skip


@family("encoder")
def roberta() -> hf.PretrainedConfig:
    return hf.RobertaConfig(
        vocab_size=163, hidden_size=88, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=1, max_position_embeddings=99, type_vocab_size=1,
        initializer_range=0.12,
    )  # fmt: skip


@family("encoder", token_types=True)
def minilm() -> hf.PretrainedConfig:
    return hf.BertConfig(
        vocab_size=137, hidden_size=96, intermediate_size=152, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=113, initializer_range=0.12,
    )  # fmt: skip


@family("encoder")
def mpnet() -> hf.PretrainedConfig:
    return hf.MPNetConfig(
        vocab_size=139, hidden_size=72, intermediate_size=136, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=91, initializer_range=0.12,
    )  # fmt: skip


@family("encoder", token_types=True)
def albert() -> hf.PretrainedConfig:
    # Both layers have the same weights.
    return hf.AlbertConfig(
        vocab_size=151, embedding_size=40, hidden_size=72, intermediate_size=120,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=93,
        initializer_range=0.12, **_TOKENS,
    )  # fmt: skip


@family("encoder", token_types=True)
def electra() -> hf.PretrainedConfig:
    return hf.ElectraConfig(
        vocab_size=157, embedding_size=40, hidden_size=72, intermediate_size=120,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=93,
        initializer_range=0.12, pad_token_id=2,
    )  # fmt: skip


@family("encoder")
def modernbert() -> hf.PretrainedConfig:
    return hf.ModernBertConfig(
        vocab_size=163, hidden_size=72, intermediate_size=104, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=97, local_attention=8,
        global_attn_every_n_layers=2, initializer_range=0.12, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, cls_token_id=0, sep_token_id=1, reference_compile=False,
    )  # fmt: skip


@family("encoder-decoder")
def t5() -> hf.PretrainedConfig:
    return hf.T5Config(
        vocab_size=131, d_model=72, d_kv=40, d_ff=136, num_layers=2, num_heads=2,
        relative_attention_num_buckets=16, relative_attention_max_distance=32,
        feed_forward_proj="relu", decoder_start_token_id=2, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip


@family("encoder-decoder", name="flan-t5")
def flan_t5() -> hf.PretrainedConfig:
    return hf.T5Config(
        vocab_size=131, d_model=80, d_kv=24, d_ff=104, num_layers=1, num_heads=3,
        relative_attention_num_buckets=16, relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=2,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip


@family("encoder-decoder")
def bart() -> hf.PretrainedConfig:
    return hf.BartConfig(
        vocab_size=131, d_model=66, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=56, decoder_ffn_dim=40,
        max_position_embeddings=63, init_std=0.12, decoder_start_token_id=2, **_TOKENS,
    )  # fmt: skip


@family("encoder-decoder")
def marian() -> hf.PretrainedConfig:
    return hf.MarianConfig(
        vocab_size=139, d_model=80, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=88, decoder_ffn_dim=104,
        max_position_embeddings=67, activation_function="swish", scale_embedding=True,
        init_std=0.12, decoder_start_token_id=2, **_TOKENS,
    )  # fmt: skip


# They are families as well: importing them fills the table.
import corpus.pruned_families  # noqa: E402, F401
