"""Routes from a model in torch to an ONNX file: a function a route, as its tool documents it.

A route gets a family and an empty folder, and writes one ONNX file or several.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from corpus.experts import loop_over_all_experts
from corpus.families import Family, Kind

BUILDER_PYTHON = (
    "SLMTVM_BUILDER_PYTHON"  # environment variable: a Python with the peer-models extra
)
_BATCH, _LENGTH, _PAST = 2, 7, 5  # of the example inputs; no two dimensions alike


@dataclass(frozen=True)
class Route:
    """A way to export; ``environment`` names the extra of pyproject.toml that it needs."""

    name: str
    write: Callable[[Family, Path], None]
    kinds: tuple[Kind, ...]
    families: tuple[str, ...] = ()  # all of its kinds where empty
    environment: str = "fixtures"

    def takes(self, family: Family) -> bool:
        """Whether the route exports this family at all."""
        if family.environment not in ("", self.environment):
            return False
        if self.families:
            return family.name in self.families
        return family.kind in self.kinds


# ---- torch.onnx.export


class _Exported(torch.nn.Module):
    """A model whose inputs and outputs are tensors in a fixed order, as exporters want them."""

    def __init__(self, family: Family, inputs: Sequence[str], attention: str, layers: int) -> None:
        super().__init__()
        self.model = family.model(attention)
        loop_over_all_experts(self.model)
        self.inputs = tuple(inputs)
        self.layers = layers
        self.kind = family.kind

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.inputs, tensors[: len(self.inputs)], strict=True))
        past = tensors[len(self.inputs) :]
        if self.kind == "encoder":
            return (self.model(**named).last_hidden_state,)
        if not self.layers:
            return (self.model(**named, use_cache=False).logits,)
        cache = hf.DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(**named, past_key_values=cache, use_cache=True)
        present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)


def _example(family: Family, names: Sequence[str], past: int) -> list[torch.Tensor]:
    """Values for the named inputs, batch 2."""
    vocab = family.configuration().vocab_size
    ids = (torch.arange(_BATCH * _LENGTH).reshape(_BATCH, _LENGTH) * 5 + 3) % vocab
    values = {
        "input_ids": ids,
        "decoder_input_ids": ids.flip(1)[:, 2:],
        "attention_mask": torch.ones(_BATCH, past + _LENGTH, dtype=torch.int64),
        "position_ids": torch.arange(past, past + _LENGTH).expand(_BATCH, -1).contiguous(),
        "token_type_ids": torch.zeros_like(ids),
    }
    return [values[name] for name in names]


def _cache_example(config: hf.PretrainedConfig) -> list[torch.Tensor]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (_BATCH, heads, _PAST, dim)
    return [torch.rand(shape) for _ in range(2 * config.num_hidden_layers)]


def _torch(
    family: Family,
    folder: Path,
    *,
    dynamo: bool,
    inputs: Sequence[str] = ("input_ids",),
    past: bool = False,
    attention: str = "sdpa",
    opset: int | None = None,
) -> None:
    """torch.onnx.export of the model behind plain tensors, batch and lengths dynamic."""
    config = family.configuration()
    inputs = tuple(inputs)
    if family.kind == "encoder-decoder":
        inputs = (*inputs, "decoder_input_ids")
    if family.token_types:
        inputs = (*inputs, "token_type_ids")
    layers = config.num_hidden_layers if past else 0
    module = _Exported(family, inputs, attention, layers).eval()
    values = _example(family, inputs, _PAST if past else 0)
    axes = [_axes(name, past) for name in inputs]
    names, outputs = list(inputs), ["last_hidden_state" if family.kind == "encoder" else "logits"]
    output_axes = [{0: "batch", 1: "sequence"}]
    if past:
        values += _cache_example(config)
        names += [f"past_key_values.{i}.{kv}" for i in range(layers) for kv in ("key", "value")]
        outputs += [f"present.{i}.{kv}" for i in range(layers) for kv in ("key", "value")]
        axes += [{0: "batch", 2: "past"}] * (2 * layers)
        output_axes += [{0: "batch", 2: "total"}] * (2 * layers)
    path = folder / "model.onnx"
    if dynamo:
        program = torch.onnx.export(
            module, tuple(values), dynamo=True, opset_version=opset, verbose=False,
            input_names=names, output_names=outputs,
            dynamic_shapes=(tuple(_dynamic(a) for a in axes),),
        )  # fmt: skip
        program.save(str(path), external_data=False)
        return
    with _traceable():
        torch.onnx.export(
            module, tuple(values), str(path), dynamo=False, opset_version=opset,
            input_names=names, output_names=outputs,
            dynamic_axes=dict(zip([*names, *outputs], [*axes, *output_axes], strict=True)),
        )  # fmt: skip


@contextmanager
def _traceable() -> Iterator[None]:
    """transformers as the tracing exporter takes it: masks without vmap, as optimum makes them."""
    from optimum.exporters.onnx import model_patcher as patched
    from transformers import cache_utils, masking_utils

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = {name: masks[name] for name in ("sdpa", "eager")}
    packed, update = masking_utils.find_packed_sequence_indices, cache_utils.DynamicLayer.update
    masks.register("sdpa", patched.sdpa_mask_without_vmap)
    masks.register("eager", patched.eager_mask_without_vmap)
    masking_utils.find_packed_sequence_indices = patched.find_packed_sequence_indices_patched
    cache_utils.DynamicLayer.update = patched.patched_dynamic_layer_update
    try:
        yield
    finally:
        for name, function in before.items():
            masks.register(name, function)
        masking_utils.find_packed_sequence_indices = packed
        cache_utils.DynamicLayer.update = update


def _axes(name: str, past: bool) -> dict[int, str]:
    if name == "attention_mask" and past:
        return {0: "batch", 1: "total"}
    return {0: "batch", 1: "decoder_sequence" if name.startswith("decoder") else "sequence"}


def _dynamic(axes: dict[int, str]) -> dict[int, object]:
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


# ---- optimum


_TASKS = {"decoder": "text-generation", "encoder": "feature-extraction",
          "encoder-decoder": "text2text-generation"}  # fmt: skip


def _optimum(family: Family, folder: Path, *, past: bool = False, merged: bool = False) -> None:
    """optimum's exporter; merged: one decoder for both steps, an If over the two graphs."""
    from optimum.exporters.onnx import main_export

    task = _TASKS[family.kind] + ("-with-past" if past else "")
    with tempfile.TemporaryDirectory() as source:
        save_pretrained(family, Path(source))
        main_export(
            source, folder, task=task, do_validation=False, no_post_process=past and not merged,
            legacy=merged and family.kind == "decoder",
        )  # fmt: skip


def save_pretrained(family: Family, folder: Path) -> None:
    """The model and a tokenizer of one word a token, as transformers saves them."""
    model = family.model()
    model.save_pretrained(folder)
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    tokens = Tokenizer(WordLevel(words, unk_token="t0"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="t1", bos_token="t0", pad_token="t2"
    )
    tokenizer.save_pretrained(folder)


# ---- onnxruntime-genai's model builder


def _builder(
    family: Family, folder: Path, *, precision: str = "fp32", options: Sequence[str] = (),
    provider: str = "cpu",
) -> None:  # fmt: skip
    """onnxruntime-genai's model builder, in the environment that it needs."""
    with tempfile.TemporaryDirectory() as scratch:
        save_pretrained(family, Path(scratch) / "hf")
        extra = ["--extra_options", *options] if options else []
        result = subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder",
             "-i", str(Path(scratch) / "hf"), "-o", str(folder), "-p", precision, "-e", provider,
             "-c", str(Path(scratch) / "cache"), *extra],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])


_GENAI = (
    "llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "lfm2-moe",
)  # fmt: skip
_LANGUAGE: tuple[Kind, ...] = ("decoder", "encoder-decoder")
_ALL: tuple[Kind, ...] = ("decoder", "encoder", "encoder-decoder")
_MASKED = ("input_ids", "attention_mask")
_POSITIONED = ("input_ids", "attention_mask", "position_ids")
# Exported with transformers 5 as well.
_FIVE = (
    "llama", "gemma3", "mistral", "mixtral", "qwen2-moe", "qwen3-moe", "lfm2-moe", "bert", "t5",
)  # fmt: skip
_EVERY_OPSET = ("llama", "bert", "gpt2")


def _routes() -> list[Route]:
    routes = [
        Route("dynamo", partial(_torch, dynamo=True), _ALL),
        Route("dynamo-eager", partial(_torch, dynamo=True, attention="eager"), _ALL),
        Route("dynamo-masked", partial(_torch, dynamo=True, inputs=_MASKED), _ALL),
        Route("script", partial(_torch, dynamo=False), _ALL),
        Route("script-eager", partial(_torch, dynamo=False, attention="eager"), _ALL),
        Route("script-masked", partial(_torch, dynamo=False, inputs=_MASKED), _ALL),
        Route("dynamo-positions", partial(_torch, dynamo=True, inputs=_POSITIONED), ("decoder",)),
        Route("dynamo-past", partial(_torch, dynamo=True, inputs=_MASKED, past=True), ("decoder",)),
        Route(
            "script-past", partial(_torch, dynamo=False, inputs=_MASKED, past=True), ("decoder",)
        ),
        Route("dynamo5", partial(_torch, dynamo=True), _ALL, _FIVE, "peer-models"),
        Route(
            "dynamo5-past",
            partial(_torch, dynamo=True, inputs=_MASKED, past=True),
            ("decoder",),
            tuple(f for f in _FIVE if f not in ("bert", "t5")),
            "peer-models",
        ),
        Route("optimum", _optimum, _ALL),
        Route("optimum-past", partial(_optimum, past=True), _LANGUAGE),
        Route("optimum-merged", partial(_optimum, past=True, merged=True), _LANGUAGE),
    ]
    for opset in (14, 15, 16, 17, 18, 19, 20, 21):
        write = partial(_torch, dynamo=False, inputs=_MASKED, opset=opset)
        routes.append(Route(f"script-opset{opset}", write, _ALL, _EVERY_OPSET))
    for opset in (18, 19, 20, 21, 23):
        write = partial(_torch, dynamo=True, inputs=_MASKED, opset=opset)
        routes.append(Route(f"dynamo-opset{opset}", write, _ALL, _EVERY_OPSET))
    for name, precision, options in _BUILDER_FORMS:
        write = partial(_builder, precision=precision, options=options)
        families = _BUILDER_FAMILIES.get(name, ("llama", "qwen3", "lfm2-moe"))
        routes.append(Route(f"builder-{name}", write, ("decoder",), families, "peer-models"))
    return routes


_BUILDER_FORMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("fp32", "fp32", ()),
    ("int4", "int4", ()),
    ("fp16", "fp16", ()),
    ("int8", "int8", ()),
    ("qdq", "int4", ("use_qdq=true",)),
    ("asymmetric", "int4", ("is_symmetric=false",)),
    ("shared", "int4", ("shared_embeddings=true", "op_types_to_quantize=MatMul/Gather")),
    ("mixed", "int4", ("algo_config=k_quant_mixed", "block_size=16")),
    ("hidden-states", "fp32", ("include_hidden_states=true",)),
)
_BUILDER_FAMILIES = {
    "fp32": _GENAI,
    "int4": _GENAI,
    "shared": ("qwen3", "smollm"),  # those with a tied head
    "asymmetric": ("llama", "lfm2-moe"),  # of a tied head it makes what onnxruntime does not load
    "mixed": ("qwen2",),  # k-quant takes an even number of blocks only
}
ROUTES: dict[str, Route] = {route.name: route for route in _routes()}
