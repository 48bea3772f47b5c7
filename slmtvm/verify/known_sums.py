"""Whether this machine's onnxruntime computes an operator rightly: small sums that are known.

Its kernels are chosen by the CPU, the types and the attributes of a node; releases have had wrong
ones. A model is only worth comparing with where the kernels that it uses are right. A probe takes a
millisecond or two, and is run once in a process for each form of an operator that a file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from slmtvm.verify.block_products import float_weights, with_float_weights
from slmtvm.verify.unsigned_weights import with_unsigned_weights

_MICROSOFT = "com.microsoft"
BLOCKS = (_MICROSOFT, "MatMulNBits")
_T = onnx.TensorProto
_K, _N, _ROWS = 64, 32, 5  # of a probe's product
# Of the largest sum: what activations in 8 bits, or sums in 11 bits of mantissa, may be off.
_TOLERANCE = {_T.FLOAT: 0.02, _T.FLOAT16: 0.02, _T.BFLOAT16: 0.05}
_ROUNDED = 1e-5  # of the largest sum: of integers, in float32
DISABLE_PREPACKING = "session.disable_prepacking"


@dataclass(frozen=True)
class Form:
    """A node as far as onnxruntime's choice of a kernel may depend on it.

    ``types``: element types of its inputs, 0 where there is none or it is not known.
    """

    domain: str
    operator: str
    types: tuple[int, ...] = ()
    attributes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in self.attributes]
        if (self.domain, self.operator) == BLOCKS:
            absent = [*self.types, *[0] * 6][:6]
            parts.append(helper.tensor_dtype_to_string(absent[2]).rpartition(".")[2].lower())
            roles = ("zero points", "g_idx", "bias")
            parts += [role for role, given in zip(roles, absent[3:], strict=True) if given]
        return f"{self.operator} ({', '.join(parts)})" if parts else self.operator


@dataclass(frozen=True)
class Probe:
    """A graph of one input ``x`` and one output ``y``, and what that is for ``rows``."""

    model: onnx.ModelProto
    rows: np.ndarray
    expected: np.ndarray
    tolerance: float  # relative to the largest value


@cache
def is_right(form: Form, level: int, *, prepacked: bool, remedied: bool) -> bool:
    """Whether onnxruntime computes ``form`` rightly.

    ``level``: of graph optimization, as int. ``prepacked``: whether weights are laid out when a
    session is made. ``remedied``: in the place of the node is what ``remedy`` puts there.
    """
    probe = _PROBES[form.domain, form.operator](form)
    model = probe.model
    if remedied:
        model = remedy(model, forms_of(model))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not prepacked:
        options.add_session_config_entry(DISABLE_PREPACKING, "1")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {"x": probe.rows})
    except Exception:  # onnxruntime's exceptions have no base of their own
        return False
    off = np.abs(np.asarray(found, np.float64) - probe.expected).max()
    return bool(off <= probe.tolerance * np.abs(probe.expected).max())  # NaN is not


def remedy(
    model: onnx.ModelProto, wrong: Collection[Form], folder: Path | None = None
) -> onnx.ModelProto:
    """``model``, changed in place, with what gives the numbers of ``wrong`` by other kernels.

    ``folder`` holds its external data.
    """
    if any((form.domain, form.operator) == BLOCKS for form in wrong):
        outputs = {
            name for form, names in forms_of(model).items() if form in wrong for name in names
        }
        with_float_weights(model, lambda node: node.output[0] in outputs, folder)
    if any((form.domain, form.operator) != BLOCKS for form in wrong):
        return with_unsigned_weights(model) or model
    return model


def forms_of(model: onnx.ModelProto) -> dict[Form, list[str]]:
    """The forms of operators that there are probes for, each with the outputs of its nodes."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    found: dict[Form, list[str]] = {}
    for node in _nodes(model.graph, types):
        if (form := form_of(node, types)) is not None:
            found.setdefault(form, []).append(node.output[0])
    return found


def form_of(node: onnx.NodeProto, types: Mapping[str, int]) -> Form | None:
    """The form of a node, by its constants' element types; None where there is no probe for it."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    domain, operator = _PROBED_AS.get((domain, node.op_type), (domain, node.op_type))
    if (domain, operator) not in _PROBES:
        return None
    if (domain, operator) not in _BY_TYPE:
        return Form(domain, operator)
    given = tuple(types.get(name, _T.FLOAT) if name else 0 for name in node.input)
    numbers = {a.name: a.i for a in node.attribute if a.name not in _SIZES}
    return Form(domain, node.op_type, given, tuple(sorted(numbers.items())))


def _nodes(graph: onnx.GraphProto, types: dict[str, int]) -> Iterator[onnx.NodeProto]:
    types.update((t.name, t.data_type) for t in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g, types)
            elif node.op_type == "Constant" and attribute.name == "value":
                types[node.output[0]] = attribute.t.data_type
        yield node


# How many values there are changes no number; what a file was packed for is nothing a probe has.
_SIZES = {"K", "N", "weight_prepacked"}


def _block_product(form: Form) -> Probe:
    """Random weights; the float32 weights that they stand for give the sums."""
    random = np.random.default_rng(1)
    attributes = dict(form.attributes)
    bits, block = attributes.get("bits", 4), attributes.get("block_size", 32)
    types = [*form.types, *[0] * 6][:6]
    k = max(2 * block, _K)
    kind = types[2] or _T.FLOAT
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    groups = -(-k // block)
    operands: dict[str, np.ndarray] = {
        "weight": random.integers(0, 256, (_N, groups, block * bits // 8)).astype(np.uint8),
        "scales": random.uniform(0.01, 0.03, (_N, groups)).astype(dtype),
    }
    if types[3] == _T.UINT8:
        width = -(-groups * bits // 8)
        operands["zero_points"] = random.integers(0, 256, (_N, width)).astype(np.uint8)
    elif types[3]:
        operands["zero_points"] = random.uniform(0, 1 << bits, (_N, groups)).astype(dtype)
    if types[4]:
        operands["group_index"] = random.permutation(np.arange(k) // block).astype(np.int32)
    if types[5]:
        operands["bias"] = random.normal(size=_N).astype(dtype)
    attributes |= {"K": k, "N": _N, "block_size": block}
    names = ["weight", "scales", "zero_points", "group_index", "bias"]
    inputs = ["a", *(name if name in operands else "" for name in names)]
    # Among other operations: whether float16 is computed in float32 depends on the neighbours.
    one = np.ones(1, dtype)
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"]),
        helper.make_node(form.operator, inputs, ["b"], domain=form.domain, **attributes),
        helper.make_node("Mul", ["b", "one"], ["y"]),
    ]
    rows = random.normal(size=(_ROWS, k)).astype(dtype)
    weight = float_weights(attributes, operands).astype(np.float64)
    expected = rows.astype(np.float64) @ weight + operands.get("bias", np.zeros(1)).astype(float)
    model = _model(nodes, rows, kind, {**operands, "one": one})
    return Probe(model, rows, expected, _TOLERANCE[kind])


def _integer_product(form: Form) -> Probe:
    """The largest weights, whose sums saturate first."""
    random = np.random.default_rng(2)
    rows = random.integers(0, 256, (_ROWS, _K)).astype(np.uint8)
    rows[0], rows[1] = 255, 0
    weight = random.choice(np.array([-128, 127], np.int8), (_K, _N))
    weight[:, 0] = 127
    sums = (rows.astype(np.int64) @ weight).astype(np.float64)
    unit = np.float32(2.0**-10)
    step = np.float32(2.0**13)  # 255 * 128 * 64 of them are 255 at most
    constants = {
        "w": weight, "one": np.float32(1), "unit": unit, "zero": np.uint8(0), "z": np.int8(0),
        "step": step, "middle": np.uint8(128),
    }  # fmt: skip
    inputs, scale = _INTEGER_INPUTS[form.operator]
    expected = sums * scale * (float(unit) if "unit" in inputs else 1.0)
    if "step" in inputs:
        expected = np.clip(np.rint(sums / float(step)) + 128, 0, 255)
    given: np.ndarray = rows.astype(np.float32) if form.operator in _FLOAT_ROWS else rows
    if "Conv" in form.operator:
        given, expected = np.ascontiguousarray(rows.T[None]), expected.T[None]
        constants["w"] = np.ascontiguousarray(weight.T[..., None])
    node = helper.make_node(form.operator, inputs, ["y"], domain=form.domain)
    kind = _T.FLOAT if given.dtype == np.float32 else _T.UINT8
    used = {name: value for name, value in constants.items() if name in inputs}
    return Probe(_model([node], given, kind, used), given, expected, _ROUNDED)


# Operator -> its inputs; "unit" and "step" are scales
_FLOAT_ROWS = {"DynamicQuantizeMatMul"}  # 0 and 255 among them: the step is 1
_INTEGER_INPUTS: dict[str, tuple[list[str], float]] = {
    "MatMulInteger": (["x", "w"], 1.0),
    "ConvInteger": (["x", "w"], 1.0),
    "MatMulIntegerToFloat": (["x", "w", "one", "unit"], 1.0),
    "DynamicQuantizeMatMul": (["x", "w", "unit"], 1.0),
    "QGemm": (["x", "one", "zero", "w", "unit", "z"], 1.0),
    "QLinearMatMul": (["x", "one", "zero", "w", "one", "z", "step", "middle"], 1.0),
    "QLinearConv": (["x", "one", "zero", "w", "one", "z", "step", "middle"], 1.0),
}


def _model(
    nodes: list[onnx.NodeProto], rows: np.ndarray, kind: int, constants: Mapping[str, Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "known sums", [helper.make_tensor_value_info("x", kind, rows.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


_PROBES: dict[tuple[str, str], Callable[[Form], Probe]] = {
    BLOCKS: _block_product,
    **{("", name): _integer_product for name in (
        "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv"
    )},
    **{(_MICROSOFT, name): _integer_product for name in (
        "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"
    )},
}  # fmt: skip
_PROBED_AS = {(_MICROSOFT, "QAttention"): ("", "MatMulInteger")}  # it multiplies with that kernel
_BY_TYPE = {BLOCKS}  # operators whose types and attributes a probe takes over
