"""Functions that end at an exit compute what the whole does, up to there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from slmtvm.early_exit import choose_exits, leads, sorted_exits
from slmtvm.errors import SlmError, UnsupportedOpError
from slmtvm.ir import ops
from slmtvm.ir.model import CanonicalModel, Exit, Output
from slmtvm.ir.reference import evaluate, evaluate_function
from slmtvm.passes.exits import with_exits
from slmtvm.passes.pipeline import fuse
from slmtvm.passes.rewrite import bindings, function_names, rebuild
from tests.passes.toy import CONTEXT, VOCAB, decoder
from tests.passes.toy_exits import LAYERS, exiting, quiet_decoder

TOKENS = np.random.default_rng(4).integers(0, VOCAB, 30).astype(np.int32)


def with_early_output(model: CanonicalModel, name: str = "early") -> CanonicalModel:
    """``model`` with a second output: the head's layers on the rows after the second layer."""
    head = exiting(model, {2: 0.0}).module["exithead0"]
    main = model.module["main"]
    by_name = {p.name: p for p in main.params}
    values: dict[relax.Var, relax.Expr] = {p: p for p in main.params}
    values |= {p: by_name[p.name] for p in head.params[1:]}
    block, sums = relax.BlockBuilder(), []
    with block.function("main", list(main.params)):
        with block.dataflow():
            for b in bindings(main):
                values[b.var] = block.emit(rebuild(b.value, values))
                if isinstance(b.value, relax.Call) and b.value.op.name == "relax.add":
                    sums.append(values[b.var])
            values[head.params[0]] = sums[3]  # two a layer
            for b in bindings(head):
                values[b.var] = block.emit(rebuild(b.value, values))
            both = [values[main.body.body], values[head.body.body]]
            returned = block.emit_output(relax.Tuple(both))
        block.emit_func_output(returned)
    module = tvm.IRModule({"main": block.get()["main"]})
    return replace(model, module=module, outputs=(Output("logits", VOCAB), Output(name, VOCAB)))


def test_stems_one_after_the_other_are_the_body_and_heads_read_them() -> None:
    model = quiet_decoder()
    cut = exiting(model, {1: 0.0, 3: 0.0})
    rows = TOKENS
    for index in range(3):
        rows = evaluate_function(cut, f"stem{index}", rows)
    assert evaluate(model, TOKENS).shape == (len(TOKENS), VOCAB)
    whole = exiting(model, {LAYERS - 1: 0.0})
    same = evaluate_function(whole, "stem1", evaluate_function(whole, "stem0", TOKENS))
    np.testing.assert_array_equal(rows, same)
    np.testing.assert_array_equal(evaluate(cut, TOKENS), evaluate(model, TOKENS))


def test_an_output_of_the_file_is_an_exit_with_a_head_of_its_own() -> None:
    model = with_early_output(quiet_decoder())
    wanted = evaluate_function(model, "main", TOKENS)
    cut = with_exits(model, [Exit(0, "early", 1.0)])
    assert [e.layer for e in cut.exits] == [2]
    assert [o.name for o in cut.outputs] == ["logits"]
    rows = evaluate_function(cut, "stem0", TOKENS)
    early = exiting(quiet_decoder(), {2: 0.0})
    np.testing.assert_array_equal(
        evaluate_function(cut, "exithead0", rows), evaluate_function(early, "exithead0", rows)
    )
    np.testing.assert_array_equal(evaluate(cut, TOKENS), wanted)


def test_a_fill_has_the_attentions_behind_its_exit_alone() -> None:
    fused = fuse(exiting(decoder("int4", layers=4), {1: 0.0, 3: 0.0}))
    layers = {
        name: [
            int(b.value.attrs["layer"])
            for b in bindings(fused.module[name])
            if isinstance(b.value, relax.Call) and b.value.op.name == "slm.qkv_attention"
        ]
        for name in function_names(fused.module)
    }
    assert layers["stem0_1"] == [0] and layers["stem1_1"] == [1, 2] and layers["stem2_1"] == [3]
    assert layers["fill0_1"] == [1, 2, 3] and layers["fill1_1"] == [3]
    assert layers["exithead0_1"] == layers["exithead1_1"] == []
    assert layers["body_1"] == [0, 1, 2, 3]
    assert not [name for name in layers if name.startswith("batch")]


@pytest.mark.slow
def test_margins_are_the_least_that_agree_with_all_layers() -> None:
    model = quiet_decoder(loudness=0.5)
    windows = [np.random.default_rng(i).integers(0, VOCAB, CONTEXT) for i in range(4)]
    cut = exiting(model, {2: 0.0})
    early, late = [], []
    for window in windows:
        rows = evaluate_function(cut, "stem0", window.astype(np.int32))
        early.append(evaluate_function(cut, "exithead0", rows))
        late.append(evaluate(model, window))
    lead = leads(np.concatenate(early))
    same = np.concatenate(early).argmax(1) == np.concatenate(late).argmax(1)
    assert same.mean() < 1
    asked = (1 + same.mean()) / 2  # more than all of them come to
    chosen, report, notes = choose_exits(model, ["2"], windows, asked)
    assert [e.layer for e in chosen.exits] == [2] and not notes
    assert [e.layer for e in sorted_exits(model, [Exit(3), Exit(1)])] == [1, 3]
    margin = chosen.exits[0].margin
    taken = lead >= margin
    assert same[taken].mean() >= asked
    assert report[0].agreement == pytest.approx(same[taken].mean())
    assert report[0].ending == pytest.approx(taken.mean()) and 0 < taken.mean() < 1
    # Lower ones, on the grid that margins are on, do not agree as often.
    lower = [margin - i / 64 for i in range(1, 200)]
    assert all(same[lead >= m].mean() < asked for m in lower if (lead >= m).sum() > taken.sum())


def test_exits_that_cannot_be_are_refused() -> None:
    model = quiet_decoder()
    with pytest.raises(SlmError, match=r"after layer 4; the model has 4: 1 to 3"):
        with_exits(model, [Exit(4)])
    with pytest.raises(SlmError, match=r"no output 'early' to exit at"):
        with_exits(model, [Exit(0, "early")])
    with pytest.raises(SlmError, match=r"2 outputs beside the exits \(logits, early\)"):
        with_exits(with_early_output(model), [Exit(1)])
    with pytest.raises(UnsupportedOpError, match="exits of an encoder;"):
        with_exits(replace(model, kind="encoder"), [Exit(1)])
    with pytest.raises(SlmError, match="two exits after one layer"):
        choose_exits(model, ["2", "2"], [TOKENS])
    with pytest.raises(SlmError, match="at no margin"):
        choose_exits(quiet_decoder(loudness=30.0), ["1"], [TOKENS], 1.0)


def test_a_layer_that_reads_the_tokens_again_has_no_exit_before_it() -> None:
    model = decoder("f32", layers=3)
    main = model.module["main"]
    values: dict[relax.Var, relax.Expr] = {p: p for p in main.params}
    block, embedded, norms = relax.BlockBuilder(), None, 0
    with block.function("main", list(main.params)):
        with block.dataflow():
            for b in bindings(main):
                value = rebuild(b.value, values)
                values[b.var] = block.emit(value)
                if isinstance(value, relax.Call) and value.op == ops.EMBEDDING:
                    embedded = values[b.var]
                if isinstance(value, relax.Call) and value.op == ops.RMS_NORM:
                    norms += 1
                    if norms == 5:  # of the last layer's input
                        values[b.var] = block.emit(relax.op.add(values[b.var], embedded))
            returned = block.emit_output(values[main.body.body])
        block.emit_func_output(returned)
    again = replace(model, module=tvm.IRModule({"main": block.get()["main"]}))
    with pytest.raises(UnsupportedOpError, match=r"what layer 2 reads is not one row"):
        with_exits(again, [Exit(1)])
