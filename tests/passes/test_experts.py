"""A decoder of experts and causal convolutions, from canonical ops to a bundle that runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tvm import relax

import slmtvm
from slmtvm.bundle.write import write_bundle
from slmtvm.ir.experts import Gate, Routing
from slmtvm.ir.reference import evaluate
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.passes.rewrite import bindings
from slmtvm.plan.build import build_plan
from slmtvm.plan.model import Plan
from slmtvm.schedules.experts.points import POINTS
from slmtvm.target import Target
from tests.emulation.session import open_sessions
from tests.end_to_end.bundles import RUNNABLE, TARGETS_OF_THREE
from tests.passes.test_pipeline import op_counts
from tests.passes.toy_experts import CONTEXT, DIM, FFN, VOCAB, decoder

TOKENS = np.random.default_rng(1).integers(0, VOCAB, CONTEXT - 5)
# The sharpest of each kind: a bias and an epsilon, a gate with a limit, every expert of a token.
VARIANTS = {
    "f32": {"gate": Gate("gelu_tanh"), "routing": Routing(6, 6, "none", "softmax")},
    "int8": {
        "routing": Routing(20, 3, "sigmoid", "sum", 1e-6, 2.5),
        "biased": True,
        "gate": Gate("swiglu", 1.702, 1.0, 0.8),
    },
    "int4": {},
}
# Where activations are quantized, a rounding that falls the other way changes a value by a step.
TOLERANCE = {"f32": 2e-6, "int8": 1e-3, "int4": 5e-3}


def plan(model: slmtvm.ir.model.CanonicalModel, target: str = "host") -> Plan:
    return build_plan(lower(fuse(model), Target.load(target)), {})


def test_a_mixture_becomes_a_route_two_routed_layers_and_a_sum() -> None:
    counts = op_counts(fuse(decoder("int4")), "body_16")
    assert counts["slm.route"] == counts["slm.combine"] == 1
    assert counts["slm.routed_linear"] == 2
    # The projections of the convolution's gates are one layer, and the products its own.
    assert counts["slm.short_conv"] == 1
    assert counts["relax.multiply"] == 1  # by the shared expert's own gate


def test_a_decoded_token_reads_and_multiplies_the_experts_that_it_chose_alone() -> None:
    experts, top_k = 20, 3
    work = {
        step.kernel: compiled.kernels[step.kernel].work
        for compiled in [plan(decoder("f32", routing=Routing(experts, top_k)))]
        for function in compiled.functions
        if (function.name, function.rows) == ("body", 1)
        for step in function.steps
    }
    routed = [w for name, w in work.items() if name.startswith("routed")]
    assert sum(w.multiply_adds for w in routed) == top_k * 3 * FFN * DIM
    padded = 80 * DIM + 80 * FFN  # whole panels of 16 output channels
    assert sum(w.weight_bytes for w in routed) == top_k * 4 * padded


ROUNDED = {
    "routing": Routing(5, 2, "softmax", "sum", roundings="scores:0.004:0:255;sum:0.005:0:255"),
    "rounded": POINTS,
}


def test_rows_that_experts_round_are_multiplied_as_integers() -> None:
    function = fuse(decoder("int8", **ROUNDED), activations="file").module["body_16"]
    calls = [b.value for b in bindings(function) if isinstance(b.value, relax.Call)]
    rows = [dict(c.attrs) for c in calls if c.op.name == "slm.routed_row"]
    assert [(r["activation"], r["by_pair"], r["quantized"]) for r in rows] == [
        ("identity", 0, 1), ("swiglu", 1, 1)
    ]  # fmt: skip
    layers = [dict(c.attrs) for c in calls if c.op.name == "slm.routed_linear"]
    assert [(a["activation"], a["by_pair"]) for a in layers] == [("row_u8", 1)] * 2


@pytest.mark.parametrize("weight_format", ["f32", "int4"])
def test_rounded_rows_are_not_rounded_again_for_other_weights(weight_format: str) -> None:
    function = fuse(decoder(weight_format, rounded=("input", "hidden"))).module["body_16"]
    calls = [b.value for b in bindings(function) if isinstance(b.value, relax.Call)]
    layers = [dict(c.attrs) for c in calls if c.op.name == "slm.routed_linear"]
    assert [a["activation"] for a in layers] == ["f32", "f32"]


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["f32", "int8"])
def test_roundings_of_experts_do_not_depend_on_how_a_bundle_is_called(
    weight_format: str, tmp_path: Path
) -> None:
    model = decoder(weight_format, **ROUNDED)
    want = evaluate(model, TOKENS)
    write_bundle(tmp_path / "toy.slm", [(Target.load("host"), plan(model))])
    with slmtvm.load(tmp_path / "toy.slm", threads=1) as session:
        got = session.eval_all(TOKENS)
        errors = np.abs(got - want).max(axis=1) / np.ptp(want)
        # A rounding that falls the other way changes a row by a step. On floats that is rare; int8
        # layers before the experts round each row by its own range, so that hardly a row has none.
        usual = TOLERANCE["f32" if weight_format == "f32" else "int4"]
        assert np.median(errors) <= usual and errors.max() <= 5e-2
        session.reset()
        singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(60)])
        np.testing.assert_array_equal(singly, got[:60])
    with slmtvm.load(tmp_path / "toy.slm", threads=3, all_threads=True) as session:
        np.testing.assert_array_equal(session.eval_all(TOKENS), got)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight_format",
    # Its experts are those that every target is compared with below.
    ["f32", "int4", pytest.param("int8", marks=pytest.mark.exhaustive)],
)
def test_a_bundle_computes_what_the_ops_mean_however_it_is_called(
    weight_format: str, tmp_path: Path
) -> None:
    model = decoder(weight_format, **VARIANTS[weight_format])
    want = evaluate(model, TOKENS)
    write_bundle(tmp_path / "toy.slm", [(Target.load("host"), plan(model))])
    with slmtvm.load(tmp_path / "toy.slm", threads=1) as session:
        got = session.eval_all(TOKENS)
        assert np.abs(got - want).max() <= TOLERANCE[weight_format] * np.ptp(want)
        session.reset()
        singly = np.stack([session.eval(TOKENS[i : i + 1]) for i in range(150)])
        np.testing.assert_array_equal(singly, got[:150])
        session.seek(70)
        np.testing.assert_array_equal(session.eval_all(TOKENS[70:]), got[70:])
    with slmtvm.load(tmp_path / "toy.slm", threads=3, all_threads=True) as session:
        np.testing.assert_array_equal(session.eval_all(TOKENS), got)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "names"),
    [
        pytest.param(VARIANTS["int8"], RUNNABLE, id="plain"),
        # Of the kernels that round, tests/schedules runs each on every target.
        pytest.param(ROUNDED, TARGETS_OF_THREE, id="rounded", marks=pytest.mark.exhaustive),
    ],
)
def test_experts_and_convolutions_have_the_same_bits_on_every_target(
    variant: dict[str, object], names: tuple[str, ...], tmp_path: Path
) -> None:
    model = decoder("int8", **variant)
    targets = [Target.load(name) for name in names]
    write_bundle(tmp_path / "toy.slm", [(t, plan(model, t.name)) for t in targets])
    first: np.ndarray | None = None
    for target in targets:
        for session in open_sessions(tmp_path / "toy.slm", target, tmp_path):
            logits = session.eval_all(TOKENS[:17], 17)
            first = logits if first is None else first
            np.testing.assert_array_equal(logits, first, err_msg=f"{target.name} {session.cpu}")
