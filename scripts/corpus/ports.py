"""The same model with other inputs and outputs: their types, their order, their dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from corpus.transforms import EVERY_FAMILY, transform

_FIXED = 64  # tokens


@transform("int32", "llama-script-masked", "bert-dynamo-masked", *EVERY_FAMILY)
def _int32_inputs(source: Path, target: Path) -> None:
    """Token ids and masks in int32, cast where they enter."""
    model = onnx.load(source)
    for port in model.graph.input:
        if port.type.tensor_type.elem_type != onnx.TensorProto.INT64:
            continue
        port.type.tensor_type.elem_type = onnx.TensorProto.INT32
        wide = f"{port.name}.int64"
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == port.name:
                    node.input[index] = wide
        model.graph.node.insert(0, onnx.helper.make_node("Cast", [port.name], [wide], to=7))
    onnx.save(model, target)


@transform("reordered", "gpt2-dynamo-past", *EVERY_FAMILY)
def _reordered(source: Path, target: Path) -> None:
    """Outputs the other way round, the batch named otherwise."""
    model = onnx.load(source)
    outputs = list(reversed(model.graph.output))
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    for dim in _batches(model):
        dim.dim_param = "N"
    onnx.save(model, target)


@transform("one-batch", "gpt2-dynamo-past", *EVERY_FAMILY)
def _one_batch(source: Path, target: Path) -> None:
    """The batch is 1, whatever is called."""
    model = onnx.load(source)
    for dim in _batches(model):
        dim.dim_value = 1
    onnx.save(model, target)


@transform("half-logits", "gpt2-script-masked", *EVERY_FAMILY)
def _half_logits(source: Path, target: Path) -> None:
    """Logits, or an encoder's hidden states, cast to float16 at the end."""
    model = onnx.load(source)
    port = model.graph.output[0]
    wide = f"{port.name}.float32"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == port.name:
                    names[index] = wide
    model.graph.node.append(onnx.helper.make_node("Cast", [wide], [port.name], to=10))
    port.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(model, target)


@transform("kept-logits", "llama-optimum-past", "gpt2-optimum-past", "smollm-dynamo-past")
def _kept_logits(source: Path, target: Path) -> None:
    """Logits of the last ``num_logits_to_keep`` tokens, 0 being all: as exports for browsers."""
    model = onnx.load(source)
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    head = made["logits"]
    while head.op_type != "MatMul":
        head = made[head.input[0]]
    count = onnx.helper.make_tensor_value_info("num_logits_to_keep", onnx.TensorProto.INT64, [])
    graph.input.append(count)
    numbers = {"kept.one": [1], "kept.end": [2**63 - 1]}
    for name, values in numbers.items():
        graph.initializer.append(onnx.helper.make_tensor(name, 7, [1], values))
    place = list(graph.node).index(head)
    for node in (
        onnx.helper.make_node("Slice", [head.input[0], "kept.begin", "kept.end", "kept.one"],
                              ["kept"], name="keep"),
        onnx.helper.make_node("Reshape", ["kept.negative", "kept.one"], ["kept.begin"]),
        onnx.helper.make_node("Neg", [count.name], ["kept.negative"]),
    ):  # fmt: skip
        graph.node.insert(place, node)
    head.input[0] = "kept"
    (logits,) = [port for port in graph.output if port.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "kept"
    onnx.save(model, target)


@transform("newest-opset", "llama-dynamo-opset23", "bert-dynamo-opset22", "gpt2-dynamo-opset22")
def _newest_opset(source: Path, target: Path) -> None:
    """Operator set 25, whose definitions of what these files use are those of 22 and 23."""
    model = onnx.load(source)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = 25
    onnx.save(model, target)


@transform("ids-masked", "gpt2-script-masked", "bert-optimum", "opt-optimum")
def _ids_masked(source: Path, target: Path) -> None:
    """Token ids times the mask before they are looked up."""
    model = onnx.load(source)
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] == "input_ids":
            node.input[1] = "input_ids.masked"
    masked = onnx.helper.make_node("Mul", ["input_ids", "attention_mask"], ["input_ids.masked"])
    model.graph.node.insert(0, masked)
    onnx.save(model, target)


@transform("fixed-length", "bert-optimum", "minilm-dynamo-masked")
def _fixed_length(source: Path, target: Path) -> None:
    """Inputs of one sequence of a fixed length, as exports for accelerators have them."""
    model = onnx.load(source)
    for port in model.graph.input:
        for dim, size in zip(port.type.tensor_type.shape.dim, (1, _FIXED), strict=True):
            dim.dim_value = size
    onnx.save(model, target)


def _batches(model: onnx.ModelProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """The dimensions of the ports that are the batch."""
    for port in (*model.graph.input, *model.graph.output):
        for dim in port.type.tensor_type.shape.dim:
            if dim.dim_param.startswith(("batch", "s0")):
                yield dim
