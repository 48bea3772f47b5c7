"""Routes from a model in torch to an ONNX file: a function a route, as its tool documents it.

A route gets a family and an empty folder, and writes one ONNX file or several.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from corpus.experts import loop_over_all_experts
from corpus.families import Family, Kind
from corpus.heads import BOTH_HALVES, HEADED, HEADS, SCORED
from corpus.releases import RELEASES, Release, as_known, traced

_BATCH, _LENGTH, _PAST = 2, 7, 5  # of the example inputs; no two dimensions alike


@dataclass(frozen=True)
class Route:
    """A way to export; ``environment`` names the extra of pyproject.toml, or the release, that it
    needs."""

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

    def __init__(
        self,
        family: Family,
        inputs: Sequence[str],
        attention: str,
        layers: int,
        states: bool,
        head: str,
    ) -> None:
        super().__init__()
        self.model = family.model(attention, head)
        loop_over_all_experts(self.model)
        self.inputs = tuple(inputs)
        self.layers = layers
        self.kind = family.kind
        self.states = states
        self.head = head

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.inputs, tensors[: len(self.inputs)], strict=True))
        past = tensors[len(self.inputs) :]
        if self.states:
            return self._with_states(**named)
        if self.head:
            return self._with_head(**named)
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

    def _with_head(self, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {} if self.kind == "encoder" else {"use_cache": False}
        result = self.model(**named, **options)
        if self.head != "embedding":
            return tuple(result[name] for name in HEADS[self.head].outputs)
        rows = result.last_hidden_state
        seen = named["attention_mask"].unsqueeze(-1).expand(rows.size()).float()
        mean = (rows * seen).sum(1) / torch.clamp(seen.sum(1), min=1e-9)
        return rows, torch.nn.functional.normalize(mean, p=2, dim=1)

    def _with_states(self, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The output and what enters each layer."""
        result = self.model(**named, output_hidden_states=True)
        if self.kind == "encoder-decoder":
            return (result.logits, *result.decoder_hidden_states[:-1])
        first = result.last_hidden_state if self.kind == "encoder" else result.logits
        return (first, *result.hidden_states[:-1])


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
    states: bool = False,
    head: str = "",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
) -> None:
    """torch.onnx.export of the model behind plain tensors, batch and lengths dynamic.

    ``states``: with the hidden states as outputs; ``head``: one of HEADS.
    """
    config = family.configuration()
    inputs = tuple(inputs)
    if family.kind == "encoder-decoder" and not head:
        inputs = (*inputs, "decoder_input_ids")
    if family.token_types:
        inputs = (*inputs, "token_type_ids")
    layers = config.num_hidden_layers if past else 0
    module = _Exported(family, inputs, attention, layers, states, head).eval().to(dtype)
    values = _example(family, inputs, _PAST if past else 0)
    if family.kind == "encoder-decoder" and head:
        values[0][:, -1] = config.eos_token_id  # whose row is scored
    axes = [_axes(name, past) for name in inputs]
    names, outputs = list(inputs), ["last_hidden_state" if family.kind == "encoder" else "logits"]
    output_axes = [{0: "batch", 1: "sequence"}]
    if head:
        outputs = list(HEADS[head].outputs)
        pooled = ("sentence_embedding", *(outputs if head == "sequence" else ()))
        output_axes = [
            {0: "batch"} if name in pooled else {0: "batch", 1: "sequence"} for name in outputs
        ]
    if states:
        layers = config.num_hidden_layers
        outputs += [f"hidden_states.{i}" for i in range(layers)]
        output_axes += [{0: "batch", 1: "sequence"}] * layers
    if past:
        values += [t.to(dtype) for t in _cache_example(config)]
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


def _optimum(
    family: Family, folder: Path, *, past: bool = False, merged: bool = False, head: str = ""
) -> None:
    """optimum's exporter; merged: one decoder for both steps, an If over the two graphs."""
    from optimum.exporters.onnx import main_export

    task = HEADS[head].task if head else _TASKS[family.kind] + ("-with-past" if past else "")
    with tempfile.TemporaryDirectory() as source:
        save_pretrained(family, Path(source), head)
        # Older versions always merge as later ones do where told so.
        legacy = {"legacy": merged and family.kind == "decoder"}
        main_export(
            source, folder, task=task, do_validation=False, no_post_process=past and not merged,
            **(legacy if "legacy" in inspect.signature(main_export).parameters else {}),
        )  # fmt: skip


def _optimum_with_other_head(family: Family, folder: Path) -> None:
    """With past; a head that the family's configuration ties to the embedding is its own, and the
    other way round."""

    def configuration() -> hf.PretrainedConfig:
        config = family.configuration()
        config.tie_word_embeddings = not config.tie_word_embeddings
        return config

    _optimum(replace(family, configuration=configuration), folder, past=True)


def save_pretrained(family: Family, folder: Path, head: str = "") -> None:
    """The model and a tokenizer of one word a token, as transformers saves them."""
    model = family.model(head=head)
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
    "llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "lfm2-moe",
    "llama-pruned",
)  # fmt: skip
_LANGUAGE: tuple[Kind, ...] = ("decoder", "encoder-decoder")
_ALL: tuple[Kind, ...] = ("decoder", "encoder", "encoder-decoder")
_MASKED = ("input_ids", "attention_mask")
_POSITIONED = ("input_ids", "attention_mask", "position_ids")
_TIED = (
    "gpt2", "smollm", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "bloom", "t5",
)  # fmt: skip
_UNTIED = (
    "llama", "mistral", "phi3", "gpt-neox", "mixtral", "qwen2-moe", "qwen3-moe", "flan-t5",
)  # fmt: skip
_EVERY_OPSET = ("llama", "bert", "gpt2")
_SOME_OPSETS = ("qwen3", "gemma2", "gpt-neox", "mixtral", "roberta", "t5")
# A version has an operator, or writes one otherwise, that the one before it does not.
_SCRIPT_OPSETS = {opset: opset in (14, 17, 18, 21) for opset in range(14, 22)}
_DYNAMO_OPSETS = {18: True, 19: False, 20: False, 21: True, 22: False, 23: True}


def _routes() -> list[Route]:
    return [
        *_torch_routes(),
        *_torch_opsets(),
        *_optimum_routes(),
        *_head_routes(),
        *_builder_routes(),
        *_old_routes(),
    ]


def _torch_routes() -> list[Route]:
    routes = []
    for name, dynamo in (("dynamo", True), ("script", False)):
        write = partial(_torch, dynamo=dynamo)
        routes += [
            Route(name, write, _ALL),
            Route(f"{name}-masked", partial(write, inputs=_MASKED), _ALL),
            Route(f"{name}-eager", partial(write, attention="eager"), _ALL),
            Route(f"{name}-states", partial(write, states=True), _ALL),
            Route(f"{name}-positions", partial(write, inputs=_POSITIONED), ("decoder",)),
            Route(f"{name}-past", partial(write, inputs=_MASKED, past=True), ("decoder",)),
        ]
    write = partial(_torch, dynamo=True)
    half = partial(write, inputs=_MASKED, dtype=torch.bfloat16)
    routes.append(Route("dynamo-bfloat16", half, _ALL))
    # Exported with transformers 5.
    past = partial(write, inputs=_MASKED, past=True)
    routes.append(Route("dynamo5", write, _ALL, environment="peer-models"))
    routes.append(Route("dynamo5-past", past, ("decoder",), environment="peer-models"))
    return routes


def _torch_opsets() -> list[Route]:
    routes = []
    for name, opsets in (("dynamo", _DYNAMO_OPSETS), ("script", _SCRIPT_OPSETS)):
        for opset, common in opsets.items():
            write = partial(_torch, dynamo=name == "dynamo", inputs=_MASKED, opset=opset)
            families = _EVERY_OPSET + _SOME_OPSETS if common else _EVERY_OPSET
            routes.append(Route(f"{name}-opset{opset}", write, _ALL, families))
    return routes


def _optimum_routes() -> list[Route]:
    return [
        Route("optimum", _optimum, _ALL),
        Route("optimum-past", partial(_optimum, past=True), _LANGUAGE),
        Route("optimum-merged", partial(_optimum, past=True, merged=True), _LANGUAGE),
        Route("optimum-past-untied", _optimum_with_other_head, _LANGUAGE, _TIED),
        Route("optimum-past-tied", _optimum_with_other_head, _LANGUAGE, _UNTIED),
    ]


def _head_routes() -> list[Route]:
    routes = []
    for name, head in HEADS.items():
        kinds: tuple[Kind, ...] = _ALL if name == "sequence" else ("encoder",)
        families = (*HEADED, *((*SCORED, *BOTH_HALVES) if name == "sequence" else ()))
        for exporter in ("dynamo", "script"):
            write = partial(_torch, dynamo=exporter == "dynamo", inputs=_MASKED, head=name)
            routes.append(Route(f"{exporter}-{name}", write, kinds, families))
        if head.task:
            routes.append(Route(f"optimum-{name}", partial(_optimum, head=name), kinds, families))
    return routes


def _builder_routes() -> list[Route]:
    routes = []
    for name, precision, options in _BUILDER_FORMS:
        write = partial(_builder, precision=precision, options=options)
        families = _BUILDER_FAMILIES.get(name, ("llama", "qwen3", "lfm2-moe", "llama-pruned"))
        routes.append(Route(f"builder-{name}", write, ("decoder",), families, "peer-models"))
    return routes


def _old_routes() -> list[Route]:
    routes = []
    for release in RELEASES:
        write, environment = partial(_released, release), release.environment
        name = f"optimum{release.optimum}"
        past, merged = partial(_optimum, past=True), partial(_optimum, past=True, merged=True)
        routes += [
            Route(name, partial(write, _optimum), _ALL, environment=environment),
            Route(f"{name}-past", partial(write, past), _LANGUAGE, environment=environment),
            Route(f"{name}-merged", partial(write, merged), _LANGUAGE, environment=environment),
        ]
        for precision in ("fp32", "int4") if release.builder else ():
            name = f"builder{release.builder}-{precision}"
            built = partial(_builder, precision=precision)
            routes.append(Route(name, built, ("decoder",), _GENAI, environment))
    return routes


def _released(
    release: Release, write: Callable[[Family, Path], None], family: Family, folder: Path
) -> None:
    with traced():
        write(as_known(release, family), folder)


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
    "shared": ("qwen2", "qwen3", "smollm", "gemma2", "gemma3"),  # those with a tied head
    # Of a tied head it makes what onnxruntime does not load.
    "asymmetric": ("llama", "mistral", "phi3", "lfm2-moe"),
    # k-quant takes an even number of blocks only.
    "mixed": ("qwen2", "smollm", "phi3"),
}
ROUTES: dict[str, Route] = {route.name: route for route in _routes()}
