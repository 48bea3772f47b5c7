"""Branches and local functions: what is computed is what stays, and the rest is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.load import count_operators
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.reference import evaluate
from tests.importer.graph_builder import run_onnxruntime, save
from tests.importer.graphs import Tiny, build
from tests.importer.test_import_spellings import op_names

CONTEXT = 48
TOLERANCE = 1e-4  # of the logits' range


def checked(model: onnx.ModelProto, folder: Path) -> CanonicalModel:
    path = save(model, folder)
    imported = import_onnx(path, context=CONTEXT)
    tokens = np.random.default_rng(1).integers(0, imported.vocab_size, 40)
    want = run_onnxruntime(path, tokens)
    assert np.abs(evaluate(imported, tokens) - want).max() <= TOLERANCE * np.ptp(want)
    return imported


def flag(model: onnx.ModelProto, value: bool) -> str:
    """A boolean that is known only after computing: whether the ids are a matrix."""
    number = numpy_helper.from_array(np.array(2 if value else 3), "rank")
    model.graph.initializer.append(number)
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
            helper.make_node("Size", ["ids_shape"], ["ids_rank"]),
            helper.make_node("Equal", ["ids_rank", "rank"], ["is_matrix"]),
        ]
    )
    return "is_matrix"


def output_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def into_branches(model: onnx.ModelProto, condition: str, *, taken: str) -> None:
    """Move all nodes into the branch ``taken`` of an If; the other one negates the logits.

    Both branches use the same names, and read the weights of the graph around them and their own.
    """
    nodes = list(model.graph.node)
    if condition == "is_matrix":
        del model.graph.node[:]
        flag(model, taken == "then_branch")
        before = list(model.graph.node)
    else:
        before = []
    nodes[-1].output[0] = "raw"
    nodes.append(helper.make_node("Mul", ["raw", "sign"], ["logits"]))
    graphs = {
        name: helper.make_graph(
            nodes, name, [], [output_info("logits")],
            [numpy_helper.from_array(np.array([1 if name == taken else -1], np.float32), "sign")],
        )
        for name in ("then_branch", "else_branch")
    }  # fmt: skip
    chosen = helper.make_node("If", [condition], ["logits_of_if"], name="if", **graphs)
    after = helper.make_node("Identity", ["logits_of_if"], ["result"])
    del model.graph.node[:]
    model.graph.node.extend([*before, chosen, after])
    model.graph.output[0].name = "result"


@pytest.mark.parametrize("taken", ["then_branch", "else_branch"])
def test_an_if_with_a_known_condition_is_the_branch_it_chooses(taken, tmp_path):
    model = build(Tiny())
    into_branches(model, "is_matrix", taken=taken)
    assert op_names(checked(model, tmp_path)) == op_names(checked(build(Tiny()), tmp_path))


def test_a_merged_decoder_is_its_branch_without_a_past(tmp_path):
    model = build(Tiny(rope="rotate_half", learned_positions=60))
    into_branches(model, "use_cache_branch", taken="else_branch")
    port = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    model.graph.input.append(port)
    imported = checked(model, tmp_path)
    assert imported.kind == "decoder"
    with pytest.raises(UnsupportedOpError, match="the model's own tables have 60"):
        import_onnx(tmp_path / "model.onnx", context=61)


def test_branches_in_branches_are_chosen_too(tmp_path):
    model = build(Tiny(layers=2))
    into_branches(model, "is_matrix", taken="then_branch")
    (outer,) = (n for n in model.graph.node if n.op_type == "If")
    branch = next(a.g for a in outer.attribute if a.name == "then_branch")
    relu = next(n for n in branch.node if n.op_type == "Sigmoid")
    keep = helper.make_graph(
        [helper.make_node("Sigmoid", [relu.input[0]], ["x"])], "keep", [], [output_info("x")]
    )
    drop = helper.make_graph(
        [helper.make_node("Neg", [relu.input[0]], ["x"])], "drop", [], [output_info("x")]
    )
    inner = helper.make_node(
        "If", ["is_matrix"], list(relu.output), name="inner", then_branch=keep, else_branch=drop
    )
    relu.CopyFrom(inner)
    plain = checked(build(Tiny(layers=2)), tmp_path)
    assert op_names(checked(model, tmp_path)) == op_names(plain)
    assert count_operators(tmp_path / "model.onnx")["If"] == 2


def length_is_over(model: onnx.ModelProto, limit: int) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.array([limit]), "limit"))
    length = helper.make_node("Shape", ["input_ids"], ["the_length"], start=1, end=2)
    model.graph.node.insert(0, length)
    model.graph.node.insert(1, helper.make_node("Greater", ["the_length", "limit"], ["is_long"]))
    return "is_long"


def guarded(model: onnx.ModelProto, condition: str) -> None:
    """The logits, or with ``condition`` their negative."""
    model.graph.node[-1].output[0] = "plain_logits"
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["plain_logits"], ["x"])], name, [], [output_info("x")]
        )
        for name, op in (("then", "Neg"), ("else", "Identity"))
    }
    model.graph.node.append(helper.make_node("If", [condition], ["logits"], name="if", **branches))


def test_a_condition_on_the_length_is_what_it_is_for_the_whole_context(tmp_path):
    model = build(Tiny())
    guarded(model, length_is_over(model, CONTEXT))
    short = checked(model, tmp_path)
    assert (short.context, short.exact_from) == (CONTEXT, 1)
    (note,) = (note for note in short.notes if "If node 'if'" in note)
    assert f"up to {CONTEXT} tokens; a --context of {CONTEXT + 1} or more" in note
    long = import_onnx(tmp_path / "model.onnx", context=CONTEXT + 9)
    assert (long.context, long.exact_from) == (CONTEXT + 9, CONTEXT + 1)
    (note,) = (note for note in long.notes if "If node 'if'" in note)
    assert f"sequences of {CONTEXT + 1} tokens and more; for shorter ones" in note
    tokens = np.random.default_rng(1).integers(0, long.vocab_size, CONTEXT + 9)
    got, other = evaluate(long, tokens), evaluate(short, tokens[:CONTEXT])
    want = run_onnxruntime(tmp_path / "model.onnx", tokens)
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)
    assert np.abs(got[:CONTEXT] + other).max() <= TOLERANCE * np.ptp(want)  # the other branch


def test_without_a_context_the_branch_of_short_sequences_bounds_it(tmp_path):
    model = build(Tiny())
    guarded(model, length_is_over(model, CONTEXT))
    assert import_onnx(save(model, tmp_path)).context == CONTEXT


def test_branches_of_the_branch_that_a_long_context_takes_are_chosen_too(tmp_path):
    model = build(Tiny())
    guarded(model, length_is_over(model, 20))
    then = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    model.graph.initializer.append(numpy_helper.from_array(np.array([30]), "higher"))
    model.graph.node.insert(1, helper.make_node("Greater", ["the_length", "higher"], ["is_longer"]))
    inner = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["plain_logits"], ["y"])], name, [], [output_info("y")]
        )
        for name, op in (("then", "Identity"), ("else", "Neg"))
    }
    then.node[0].CopyFrom(helper.make_node("If", ["is_longer"], ["x"], name="in", **inner))
    path = save(model, tmp_path)
    for length, since in ((20, 1), (30, 21), (40, 31)):
        imported = import_onnx(path, context=length)
        assert imported.exact_from == since
        tokens = np.arange(length)
        want = run_onnxruntime(path, tokens)
        assert np.abs(evaluate(imported, tokens) - want).max() <= TOLERANCE * np.ptp(want)


def test_a_condition_on_the_tokens_is_refused_by_name(tmp_path):
    model = build(Tiny())
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["input_ids"], ["m"], keepdims=0))
    model.graph.initializer.append(numpy_helper.from_array(np.array(5), "five"))
    model.graph.node.insert(1, helper.make_node("Greater", ["m", "five"], ["is_large"]))
    guarded(model, "is_large")
    with pytest.raises(UnsupportedOpError, match=r"If node 'if': its condition is not known"):
        import_onnx(save(model, tmp_path), context=CONTEXT)


def test_an_unknown_operator_in_a_branch_is_listed(tmp_path):
    model = build(Tiny())
    guarded(model, length_is_over(model, CONTEXT))
    next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch").node[
        0
    ].op_type = "Nought"
    with pytest.raises(UnsupportedOpError, match=r"ai.onnx.Nought \(version 18\)"):
        import_onnx(save(model, tmp_path), context=CONTEXT)


def test_a_branch_that_reads_what_nothing_defines_names_the_node(tmp_path):
    model = build(Tiny())
    guarded(model, length_is_over(model, CONTEXT))
    branch = next(a.g for a in model.graph.node[-1].attribute if a.name == "then_branch")
    branch.node[0].input[0] = "nowhere"
    with pytest.raises(InvalidModelError, match=r"If node 'if': input 'nowhere' is defined nowh"):
        import_onnx(save(model, tmp_path), context=CONTEXT)


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_a_loop_is_refused_by_name(kind, tmp_path):
    def edit(model):
        ports = [helper.make_tensor_value_info(n, TensorProto.INT64, []) for n in ("i", "x")]
        flag_port = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["on"])], "body", [ports[0], flag_port],
            [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
        )  # fmt: skip
        model.graph.node.append(
            helper.make_node(kind, ["input_ids"], ["looped"], name="loop", body=body)
        )

    model = build(Tiny())
    edit(model)
    with pytest.raises(UnsupportedOpError, match=rf"ai.onnx.{kind} \(version 18\): 'loop'"):
        import_onnx(save(model, tmp_path), context=CONTEXT)


# --- local functions -----------------------------------------------------------------------------


def silu_function(**changes) -> onnx.FunctionProto:
    """Gate(x; alpha) = x * sigmoid(alpha * x), in calls of another function and a branch."""
    opset = changes.get("opset", 18)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("inner", 1)]
    alpha = helper.make_node("Constant", [], ["alpha"])
    reference = onnx.AttributeProto(
        name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope"
    )
    alpha.attribute.append(reference)
    branch = helper.make_graph(
        [helper.make_node("Scaled", ["x", "alpha"], ["scaled"], domain="inner")],
        "then", [], [output_info("scaled")],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["scaled"])], "else", [], [output_info("scaled")]
    )
    nodes = [
        alpha,
        helper.make_node("Equal", ["alpha", "alpha"], ["yes"]),
        helper.make_node("If", ["yes"], ["scaled_x"], then_branch=branch, else_branch=other),
        helper.make_node("Sigmoid", ["scaled_x"], ["weight"]),
        helper.make_node("Mul", ["x", "weight"], ["y"]),
    ]
    return helper.make_function("outer", "Gate", ["x"], ["y"], nodes, opsets, ["slope"])


def scaled_function(opset: int) -> onnx.FunctionProto:
    """Scaled(x, a) = a * sum(x, over a new axis of one): written as its operator set has it."""
    if opset < 13:
        widen = [helper.make_node("Unsqueeze", ["x"], ["wide"], axes=[0])]
    else:
        axes = helper.make_node("Constant", [], ["axes"], value_ints=[0])
        widen = [axes, helper.make_node("Unsqueeze", ["x", "axes"], ["wide"])]
    nodes = [
        *widen,
        helper.make_node("Mul", ["wide", "a"], ["product"]),
        helper.make_node("Squeeze", ["product"] if opset < 13 else ["product", "axes"], ["y"]),
    ]
    if opset < 13:
        nodes[-1].attribute.append(helper.make_attribute("axes", [0]))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function("inner", "Scaled", ["x", "a"], ["y"], nodes, opsets)


def with_functions(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    """Tiny with its Relu replaced by a call of Gate with slope 1: silu."""
    model = build(Tiny(activation="relu", layers=2))
    model.functions.extend(functions)
    model.opset_import.extend([helper.make_opsetid("outer", 1), helper.make_opsetid("inner", 1)])
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Gate", "outer"
            node.attribute.append(helper.make_attribute("slope", 1.0))
    return model


def test_functions_in_branches_of_functions_are_inlined_with_their_attributes(tmp_path):
    imported = checked(with_functions(silu_function(), scaled_function(18)), tmp_path)
    assert op_names(imported).count("relax.nn.silu") == 2
    assert "relax.sigmoid" not in op_names(imported)


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_a_function_may_use_another_version_of_an_operator_set_than_the_model(opset, tmp_path):
    """onnxruntime takes such a file only where no operator changed in between: no comparison."""
    path = save(with_functions(silu_function(), scaled_function(opset)), tmp_path)
    same = save(with_functions(silu_function(), scaled_function(18)), tmp_path, "same.onnx")
    tokens = np.arange(20)
    got, want = (evaluate(import_onnx(p, context=CONTEXT), tokens) for p in (path, same))
    assert np.array_equal(got, want)


def test_two_functions_of_one_name_differ_by_their_overload(tmp_path):
    model = with_functions(silu_function(), scaled_function(18))
    other = helper.make_function(
        "inner", "Scaled", ["x", "a"], ["y"], [helper.make_node("Neg", ["x"], ["y"])],
        [helper.make_opsetid("", 18)], overload="negative",
    )  # fmt: skip
    model.functions.append(other)
    model.ir_version = 10
    imported = checked(model, tmp_path)
    assert op_names(imported).count("relax.nn.silu") == 2
