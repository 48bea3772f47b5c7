#!/usr/bin/env python3
"""Makes the models that scripts/bench_peers.py measures, each in the peers' own formats.

    pip install '.[peer-models]'
    python scripts/make_bench_models.py OUT [--models demo tiny15 smol135 minilm]

OUT/NAME/hf/            the float weights (safetensors) with a tokenizer
OUT/NAME/int4/, int8/   onnxruntime-genai's model builder, blocks of 32: ours reads it too
OUT/NAME/int4.gguf, int8.gguf   llama.cpp's Q4_0, Q8_0 (blocks of 32) in all matrices, the embedding
                        included
OUT/minilm/model_int8.onnx   MiniLM by torch's exporter and onnxruntime's dynamic quantization

tiny15, smol135 and smol360 have random weights: only their sizes matter for speed. The demo model's
weights are those that the tests use, unless --demo names a folder with its safetensors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models import forms, pycode, weights
from tests.models.quantizers import quantize_int8

SEED = 0
EXPORT_MINILM = Path(__file__).resolve().parents[1] / "tests" / "models" / "export_minilm.py"
NAMES = ("demo", "tiny15", "smol135", "smol360", "minilm")
RANDOM = {
    "tiny15": {
        "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 32000,
    },
    "smol135": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "smol360": {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49152,
    },
}  # fmt: skip
DEMO = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
CONTEXT = {"demo": 1024, "tiny15": 1024, "smol135": 2048, "smol360": 2048}
# They apply to int8 as well.
BUILDER_OPTIONS = ("int4_accuracy_level=4", "int4_block_size=32")
GGUF_TYPES = {
    "int4": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def llama(name: str) -> LlamaForCausalLM:
    """The model with its random weights, or an empty one for the demo's."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        **(DEMO if name == "demo" else RANDOM[name]),
        max_position_embeddings=CONTEXT[name],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write_hf(name: str, demo: Path | None, folder: Path) -> None:
    """The float model and a tokenizer, as transformers saves them."""
    if name == "demo" and demo is not None:
        shutil.copytree(demo, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.onnx"))
        return
    model = llama(name)
    if name == "demo":
        state = {n: torch.from_numpy(w) for n, w in weights.load(forms.WEIGHTS).items()}
        model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(pycode.TOKENIZER))
    else:
        words = {f"t{i}": i for i in range(model.config.vocab_size)}
        tokens = Tokenizer(WordLevel(words, unk_token="t0"))
        tokens.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="t0")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_genai(hf: Path, precision: str, folder: Path) -> None:
    """onnxruntime-genai's own builder, as its documentation calls it."""
    with tempfile.TemporaryDirectory() as scratch:
        result = subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(hf),
             "-o", str(folder), "-p", precision, "-e", "cpu", "-c", scratch,
             "--extra_options", *BUILDER_OPTIONS],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode != 0:
        sys.exit(f"onnxruntime-genai's model builder failed:\n{result.stderr}")


def write_gguf(hf: Path, precision: str, path: Path) -> None:
    """llama.cpp's file: matrices in Q4_0 or Q8_0; no head, it is tied, and no vocabulary."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.parent.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kind, file_type = GGUF_TYPES[precision]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = tensor.numpy()
        projection = name.split(".")[-2]
        if projection in heads:
            value = interleave_rotary(value, heads[projection])
        target = names.get_name(name, try_suffixes=(".weight",))
        if value.ndim == 1:
            writer.add_tensor(target, value)
        else:
            writer.add_tensor(target, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (i, i + head_dim / 2) of each head become neighbours: llama.cpp rotates such pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write_minilm(path: Path) -> None:
    """all-MiniLM-L6-v2 in dynamic int8, exported as the tests do."""
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "model.onnx"
        subprocess.run([sys.executable, str(EXPORT_MINILM), str(exported)], check=True)
        quantize_int8(exported, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--demo", type=Path, help="folder with the demo model's safetensors")
    arguments = parser.parse_args()
    for name in arguments.models:
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "minilm":
            write_minilm(folder / "model_int8.onnx")
        else:
            write_hf(name, arguments.demo, folder / "hf")
            for precision in GGUF_TYPES:
                write_genai(folder / "hf", precision, folder / precision)
                write_gguf(folder / "hf", precision, folder / f"{precision}.gguf")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            print(f"{path.stat().st_size:>12,} {path.relative_to(arguments.out)}", flush=True)


if __name__ == "__main__":
    main()
