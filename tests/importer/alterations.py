"""Valid graphs altered as tools and people alter them: another valid graph that computes otherwise.

Operators put between others, operands exchanged, weights shared or scaled, attributes and constants
changed. ``mutations`` damages files; here onnxruntime still runs most of what comes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_FLOATS = (np.float32, np.float16)
_TRIES = 40  # to find a place where an alteration fits


@dataclass
class Altered:
    """A model that is being altered, and what onnxruntime computed for each value before that."""

    model: ModelProto
    values: Mapping[str, np.ndarray]
    rng: random.Random
    made: int = 0
    said: list[str] = field(default_factory=list)  # what was done, in order

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    def constant(self, array: np.ndarray) -> str:
        """The name of a new initializer."""
        self.made += 1
        name = f"altered_constant_{self.made}"
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def fresh(self) -> str:
        self.made += 1
        return f"altered_{self.made}"

    def size(self, value: str) -> float:
        """The largest size of a number in ``value``."""
        sizes = np.abs(self.values[value].astype(np.float64))
        return float(sizes.max(where=np.isfinite(sizes), initial=0)) or 1.0


def alter(
    model: ModelProto, values: Mapping[str, np.ndarray], rng: random.Random
) -> tuple[ModelProto, str]:
    """A copy of ``model`` with one or two alterations, and what they are.

    ``values``: what its nodes compute on some tokens, by name; bounds are put inside and outside of
    what is there.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    altered = Altered(copy, values, rng)
    with np.errstate(over="ignore"):  # infinite numbers are among those that may come out
        if rng.random() < 0.3:
            _scale_weight(altered)
        wanted = len(altered.said) + rng.choice((1, 1, 1, 2))
        for _ in range(_TRIES):
            rng.choice(_ALTERATIONS)(altered)
            if len(altered.said) >= wanted:
                break
    return copy, "; ".join(altered.said)


# --- operators between others --------------------------------------------------------------------

_Write = Callable[[Altered, str, str], list[NodeProto]]
"""Nodes that make the second value from the first."""


def _unary(kind: str, domain: str = "", **attrs: object) -> _Write:
    def write(_: Altered, x: str, y: str) -> list[NodeProto]:
        return [helper.make_node(kind, [x], [y], domain=domain, **attrs)]

    return write


def _bound(altered: Altered, x: str) -> np.generic:
    """A number inside or outside of what ``x`` usually is, of either sign."""
    factor = altered.rng.choice((0.2, 0.5, 0.9, 1.1, 1.5, 3, 10, 100))
    number = altered.size(x) * factor * altered.rng.choice((1, -1))
    return altered.values[x].dtype.type(number)


def _with_number(kind: str) -> _Write:
    def write(altered: Altered, x: str, y: str) -> list[NodeProto]:
        number = _bound(altered, x)
        if kind in ("Add", "Sub"):  # far larger numbers leave nothing of the others in float32
            number = number.dtype.type(min(max(number, -10.0), 10.0))
        elif kind in ("Max", "Min"):  # something is left: the norm of equal numbers is noise
            most = 0.9 * altered.size(x)
            number = number.dtype.type(min(number, most) if kind == "Max" else max(number, -most))
        inputs = [x, altered.constant(np.asarray(number))]
        if altered.rng.random() < 0.3:
            inputs.reverse()
        return [helper.make_node(kind, inputs, [y])]

    return write


def _clip(altered: Altered, x: str, y: str) -> list[NodeProto]:
    high = abs(_bound(altered, x))
    low = -high if altered.rng.random() < 0.6 else min(_bound(altered, x), high / 2)
    low = min(low, altered.size(x) / 2)
    names = [altered.constant(np.asarray(bound, high.dtype)) for bound in (low, high)]
    place = altered.rng.randrange(4)
    if place < 2:
        names[place] = ""
    return [helper.make_node("Clip", [x, *names], [y])]


def _where(altered: Altered, x: str, y: str) -> list[NodeProto]:
    test = altered.fresh()
    limit, other = (altered.constant(np.asarray(_bound(altered, x))) for _ in range(2))
    kind = altered.rng.choice(("Greater", "Less"))
    branches = altered.rng.choice(([x, other], [other, x]))
    return [
        helper.make_node(kind, [x, limit], [test]),
        helper.make_node("Where", [test, *branches], [y]),
    ]


def _guard(altered: Altered, x: str, y: str) -> list[NodeProto]:
    """What never acts: NaN or infinity replaced."""
    test = altered.fresh()
    zero = altered.constant(np.zeros((), altered.values[x].dtype))
    return [
        helper.make_node(altered.rng.choice(("IsNaN", "IsInf")), [x], [test]),
        helper.make_node("Where", [test, zero, x], [y]),
    ]


def _there_and_back(altered: Altered, x: str, y: str) -> list[NodeProto]:
    """Through another type."""
    between = altered.fresh()
    own = helper.np_dtype_to_tensor_dtype(altered.values[x].dtype)
    types = (TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
             TensorProto.INT8, TensorProto.DOUBLE)  # fmt: skip
    return [
        helper.make_node("Cast", [x], [between], to=altered.rng.choice(types)),
        helper.make_node("Cast", [between], [y], to=own),
    ]


def _by_feature(altered: Altered, x: str, y: str) -> list[NodeProto]:
    """A vector over the last axis added or multiplied."""
    array = altered.values[x]
    generator = np.random.default_rng(altered.rng.randrange(1 << 30))
    vector = generator.normal(size=array.shape[-1:]) * altered.size(x)
    kind = altered.rng.choice(("Add", "Mul", "Sub", "Max"))
    return [helper.make_node(kind, [x, altered.constant(vector.astype(array.dtype))], [y])]


def _rounded_to(altered: Altered, x: str, y: str) -> list[NodeProto]:
    """Multiples of a step."""
    step = altered.constant(np.asarray(_bound(altered, x)) / 16)
    a, b = altered.fresh(), altered.fresh()
    return [
        helper.make_node("Div", [x, step], [a]),
        helper.make_node("Round", [a], [b]),
        helper.make_node("Mul", [b, step], [y]),
    ]


_WRITERS: tuple[_Write, ...] = (
    _clip, _clip, _clip, _clip, _where, _where, _guard, _there_and_back, _there_and_back,
    _by_feature, _by_feature, _rounded_to,
    _with_number("Max"), _with_number("Max"), _with_number("Min"), _with_number("Min"),
    _with_number("Add"), _with_number("Mul"), _with_number("Sub"), _with_number("Div"),
    _unary("Abs"), _unary("Round"), _unary("Neg"), _unary("Relu"), _unary("Floor"),
    _unary("Identity"), _unary("Tanh"), _unary("Sigmoid"), _unary("LeakyRelu", alpha=0.1),
    _unary("Sign"), _unary("Softplus"), _unary("Elu", alpha=0.5), _unary("HardSigmoid"),
)  # fmt: skip


def _insert(altered: Altered) -> None:
    """An operator after a value: for all that read it, or for one of them."""
    nodes = altered.nodes
    places = [
        (i, name) for i, n in enumerate(nodes) for name in n.output if _is_float(altered, name)
    ]
    if not places:
        return
    place, name = altered.rng.choice(places)
    readers = [(n, i) for n in nodes for i, given in enumerate(n.input) if given == name]
    write = altered.rng.choice(_WRITERS)
    if readers and altered.rng.random() < 0.4:
        reader, at = altered.rng.choice(readers)
        made = write(altered, name, altered.fresh())
        reader.input[at] = made[-1].output[0]
        whose = f"for {reader.op_type} {reader.output[0]}"
    else:
        producer, raw = nodes[place], altered.fresh()
        producer.output[list(producer.output).index(name)] = raw
        altered.values = {**altered.values, raw: altered.values[name]}
        made = write(altered, raw, name)
        whose = "for all"
    for offset, node in enumerate(made):
        node.name = altered.fresh()
        altered.model.graph.node.insert(place + 1 + offset, node)
    kinds = " ".join(n.op_type for n in made)
    bounds = [_shown(altered, i) for n in made for i in n.input if i.startswith("altered_con")]
    altered.said.append(f"{kinds} ({', '.join(bounds)}) after {name} {whose}")


def _is_float(altered: Altered, name: str) -> bool:
    value = altered.values.get(name)
    return value is not None and value.dtype in _FLOATS and value.size > 1


def _shown(altered: Altered, name: str) -> str:
    tensor = next(t for t in altered.model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    return f"{array.item():.4g}" if array.size == 1 else str(list(array.shape))


# --- operands, operators, attributes -------------------------------------------------------------


def _swap_operands(altered: Altered) -> None:
    node = altered.rng.choice(altered.nodes)
    if len(node.input) >= 2 and node.input[0] != node.input[1]:
        a, b = altered.rng.sample(range(min(len(node.input), 3)), 2)
        node.input[a], node.input[b] = node.input[b], node.input[a]
        altered.said.append(f"operands {a} and {b} of {node.op_type} {node.output[0]} exchanged")


_SIBLINGS = (
    ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"),
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"),
    ("Sigmoid", "Tanh", "Relu", "Erf", "Abs", "Neg", "Softplus", "Exp"),
    ("Sqrt", "Reciprocal", "Exp"),
    ("Cos", "Sin"),
    ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal"),
    ("And", "Or", "Xor"),
    ("Softmax", "LogSoftmax"),
    ("SimplifiedLayerNormalization", "LayerNormalization"),
)


def _other_operator(altered: Altered) -> None:
    node = altered.rng.choice(altered.nodes)
    for family in _SIBLINGS:
        if node.op_type in family and not node.domain:
            other = altered.rng.choice([kind for kind in family if kind != node.op_type])
            altered.said.append(f"{node.op_type} {node.output[0]} is {other}")
            node.op_type = other


_INTS = (-1, 0, 1, 2, 3, 4)
_KEPT = ("to", "value", "block_size", "K", "N", "bits", "then_branch", "else_branch", "body")


def _other_attribute(altered: Altered) -> None:
    node = altered.rng.choice(altered.nodes)
    known = [a for a in node.attribute if a.name not in _KEPT]
    if not known:
        return
    attribute, rng = altered.rng.choice(known), altered.rng
    before = helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice((before + 1, before - 1, 2 * before, before // 2, *_INTS))
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((2 * before, before / 2, 10 * before, 0.1, 0.0, -before, 1.0))
    elif attribute.type == AttributeProto.INTS and attribute.ints:
        numbers = list(attribute.ints)
        rng.shuffle(numbers)
        attribute.ints[:] = numbers
    elif attribute.name == "approximate":
        attribute.s = b"none" if before == b"tanh" else b"tanh"
    after = helper.get_attribute_value(attribute)
    if after != before:
        said = f"{attribute.name} of {node.op_type} {node.output[0]} is {after}, not {before}"
        altered.said.append(said)


_OPTIONS: dict[str, Sequence[tuple[str, object]]] = {
    "GroupQueryAttention": (
        ("do_rotary", 0), ("do_rotary", 1), ("rotary_interleaved", 1), ("scale", 0.3),
        ("softcap", 3.0), ("local_window_size", 4), ("smooth_softmax", 1), ("num_heads", 2),
    ),
    "MultiHeadAttention": (("scale", 0.3), ("unidirectional", 1), ("mask_filter_value", -5.0)),
    "Attention": (("scale", 0.3), ("unidirectional", 1), ("unidirectional", 0)),
    "RotaryEmbedding": (("interleaved", 1), ("scale", 2.0), ("num_heads", 1)),
    "Gelu": (("approximate", "tanh"),),
    "LayerNormalization": (("epsilon", 0.1), ("axis", 1), ("axis", 2)),
    "SimplifiedLayerNormalization": (("epsilon", 0.1), ("axis", 1)),
    "SkipSimplifiedLayerNormalization": (("epsilon", 0.1),),
    "SkipLayerNormalization": (("epsilon", 0.1),),
    "Softmax": (("axis", 1), ("axis", -2)),
    "Gemm": (("alpha", 0.5), ("beta", 0.5), ("transB", 1), ("transA", 1)),
    "Transpose": (("perm", [0, 2, 1, 3]), ("perm", [0, 1, 3, 2]), ("perm", [0, 2, 1])),
    "MatMulNBits": (("accuracy_level", 0), ("accuracy_level", 4)),
    "MoE": (("normalize_routing_weights", 0), ("activation_alpha", 1.7), ("swiglu_limit", 0.1)),
    "QMoE": (("normalize_routing_weights", 0), ("activation_alpha", 1.7), ("swiglu_limit", 0.1)),
    "TopK": (("largest", 0), ("sorted", 0)),
    "CumSum": (("exclusive", 1), ("reverse", 1)),
}  # fmt: skip


def _set_option(altered: Altered) -> None:
    """An attribute of a whole layer that the file left at its default."""
    node = altered.rng.choice(altered.nodes)
    if node.op_type not in _OPTIONS:
        return
    name, value = altered.rng.choice(_OPTIONS[node.op_type])
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    altered.said.append(f"{name} of {node.op_type} {node.output[0]} is {value}")


# --- weights and constants -----------------------------------------------------------------------


def _share(altered: Altered) -> None:
    """One initializer in the place of another, as tools that look for equal ones may write it."""
    tensors = list(altered.model.graph.initializer)
    chosen = altered.rng.choice(tensors) if tensors else None
    alike = [
        t
        for t in tensors
        if chosen is not None
        and t.name != chosen.name
        and t.data_type == chosen.data_type
        and t.dims == chosen.dims
    ]
    if chosen is None or not alike:
        return
    other = altered.rng.choice(alike)
    readers = [
        (n, i) for n in altered.nodes for i, name in enumerate(n.input) if name == other.name
    ]
    if not readers:
        return
    for node, place in readers if altered.rng.random() < 0.5 else readers[:1]:
        node.input[place] = chosen.name
    altered.said.append(f"{chosen.name} {list(chosen.dims)} in the place of {other.name}")


def _is_number_tensor(tensor: TensorProto) -> bool:
    return tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)


def _scale_weight(altered: Altered) -> None:
    """A weight, a vector or a table times a number: activations reach other sizes."""
    tensors = [t for t in altered.model.graph.initializer if _is_number_tensor(t) and t.dims]
    if not tensors:
        return
    tensor = altered.rng.choice(tensors)
    factor = altered.rng.choice((0.01, 0.1, 4, 10, 30, 100))
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    altered.said.append(f"{tensor.name} times {factor}")


def _other_number(altered: Altered) -> None:
    """One number, of one that the graph holds or of a few, is another one."""
    tensors = [t for t in altered.model.graph.initializer if np.prod(t.dims, dtype=int) <= 8]
    if not tensors:
        return
    tensor, rng = altered.rng.choice(tensors), altered.rng
    array = numpy_helper.to_array(tensor).copy()
    if array.dtype.kind not in "iuf" or not array.size:
        return
    place = rng.randrange(array.size)
    before = array.reshape(-1)[place].item()
    if array.dtype.kind == "f":
        after = rng.choice((2 * before, -before, before / 3, 0.0, 100 * before, before + 1))
    else:
        after = rng.choice((before + 1, before - 1, 2 * before, 0))
    limits = np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
    if limits.min <= after <= limits.max and after != before:
        array.reshape(-1)[place] = after
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        altered.said.append(f"number {place} of {tensor.name} is {after}, not {before}")


def _other_value(altered: Altered) -> None:
    """A node reads another value of the same type and shape that is there before it."""
    place = altered.rng.randrange(len(altered.model.graph.node))
    node = altered.model.graph.node[place]
    known = [i for i, name in enumerate(node.input) if name in altered.values]
    if not known:
        return
    at = altered.rng.choice(known)
    own = altered.values[node.input[at]]
    before = {o for n in altered.nodes[:place] for o in n.output}
    alike = [
        name
        for name, v in altered.values.items()
        if name in before and v.shape == own.shape and v.dtype == own.dtype
        and name != node.input[at]
    ]  # fmt: skip
    if alike:
        other = altered.rng.choice(sorted(alike))
        altered.said.append(
            f"{node.op_type} {node.output[0]} reads {other} and not {node.input[at]}"
        )
        node.input[at] = other


_ALTERATIONS: tuple[Callable[[Altered], None], ...] = (
    *[_insert] * 8,
    _swap_operands,
    _other_operator,
    _other_operator,
    _other_attribute,
    _other_attribute,
    _set_option,
    _set_option,
    _share,
    _share,
    _scale_weight,
    _other_number,
    _other_number,
    _other_value,
)
