#!/usr/bin/env python3
"""Makes the demo model's files from a Hugging Face folder (safetensors, tokenizer, held-out text).

    pip install '.[fixtures,test]'
    python scripts/make_demo_model.py FOLDER

models/pycode-6m/               what is shipped
  model_int4.onnx                 MatMulNBits int4 (block 32, symmetric, accuracy_level 4), the
                                  embedding int4 too (GatherBlockQuantized); the original weights
  tokenizer.json, heldout.txt     copied, and the licence of heldout.txt
tests/models/pycode-6m/         what the tests build every other form from
  weights.npz                     int8 matrices, one scale a row
  no_cache.skeleton.onnx          torch.onnx.export(dynamo=True): input_ids -> logits
  with_past.skeleton.onnx         optimum, text-generation-with-past
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from optimum.exporters.onnx import main_export
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.models import forms, pycode, weights
from tests.models.quantizers import fold_tied_head, quantize_int4

OPSET = 18
COPIED = ("tokenizer.json", "heldout.txt", "LICENSE.python.txt")


class NoCache(torch.nn.Module):
    """input_ids -> logits. With "eager" attention and a causal mask given explicitly, transformers
    leaves out its search for packed sequences and the graph stays plain."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        n = input_ids.shape[1]
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def export_no_cache(folder: Path) -> onnx.ModelProto:
    """torch's exporter, batch and sequence dynamic."""
    program = torch.onnx.export(
        NoCache(folder),
        (torch.arange(20).reshape(2, 10),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=1024)},),
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.onnx"
        program.save(str(path), external_data=False)
        model = onnx.load(path)
    # The exporter notes a Python stack trace, with this machine's paths, on every node.
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.value_info, graph, model):
        del part.metadata_props[:]
    return model


def export_with_past(folder: Path) -> onnx.ModelProto:
    """optimum's exporter: past_key_values in, present out."""
    with tempfile.TemporaryDirectory() as scratch:
        main_export(
            str(folder), scratch, task="text-generation-with-past", opset=OPSET, dtype="fp32"
        )
        return onnx.load(Path(scratch) / "model.onnx")


def original_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the safetensors file, as float32."""
    tensors = load_file(folder / "model.safetensors")
    return {name: value.astype(np.float32) for name, value in sorted(tensors.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds model.safetensors and the rest")
    folder = parser.parse_args().folder
    for target in (pycode.DEMO, forms.ASSETS):
        target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(folder / name, pycode.DEMO / name)

    tensors = original_weights(folder)
    np.savez_compressed(forms.WEIGHTS, **weights.compress(tensors))
    no_cache, with_past = export_no_cache(folder), export_with_past(folder)
    for model, skeleton in ((no_cache, forms.NO_CACHE), (with_past, forms.WITH_PAST)):
        stripped = onnx.ModelProto()
        stripped.CopyFrom(model)
        weights.strip(stripped, tensors)
        onnx.save(stripped, skeleton)
        weights.fill(stripped, tensors)
        assert stripped == model, f"{skeleton.name} does not give the exporter's file again"
    int4 = quantize_int4(fold_tied_head(no_cache), ops=("MatMul", "Gather"))
    onnx.save(int4, forms.model_path(forms.DEMO_FORM))

    for target in (pycode.DEMO, forms.ASSETS):
        for path in sorted(target.iterdir()):
            print(f"{path.stat().st_size:>10,} {path.relative_to(pycode.ROOT)}")


if __name__ == "__main__":
    main()
