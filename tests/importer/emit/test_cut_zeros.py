"""Heads and channels that are zero are gone, and the model computes what its file does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

from slmtvm.compiler import compile_model, plan_model
from slmtvm.inspect import inspect
from slmtvm.ir.model import CanonicalModel, KvSpec
from slmtvm.target import Target
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.importer.quantized import TOKENS, check, matmul_nbits

TINY = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=53, rope="rotate_half")
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
Zero = Callable[[dict[str, np.ndarray]], None]


def zeroed(tiny: Tiny, zero: Zero) -> onnx.ModelProto:
    """The model, with ``zero`` called on the weights (k, n) of the first layer and, as "q.bias"
    and so on, their biases."""
    model = build(tiny)
    names = ("qkv", *NAMES[3:]) if tiny.packed_qkv else NAMES
    tensors = {t.name: t for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in tensors]
    found = {name: node.input[1] for name, node in zip(names, products, strict=False)}
    for name, node in zip(names, products, strict=False):
        (user,) = [n for n in model.graph.node if node.output[0] in n.input][:1]
        found |= {f"{name}.bias": i for i in user.input if tiny.bias and i in tensors}
    values = {name: numpy_helper.to_array(tensors[t]).copy() for name, t in found.items()}
    zero(values)
    for name, value in values.items():
        tensors[found[name]].CopyFrom(numpy_helper.from_array(value, found[name]))
    return model


def channels(*names: str, at: slice = slice(5, 31)) -> Zero:
    """Those hidden channels of the feed-forward layers of these names."""

    def zero(weights: dict[str, np.ndarray]) -> None:
        for name in names:
            if name == "down":
                weights[name][at] = 0
            else:
                weights[name][..., at] = 0

    return zero


def heads(*which: int) -> Zero:
    """The outputs of those heads are weighed with 0."""

    def zero(weights: dict[str, np.ndarray]) -> None:
        for head in which:
            weights["o"][12 * head : 12 * (head + 1)] = 0

    return zero


def hidden(model: CanonicalModel) -> set[int]:
    """The widths between the feed-forward layers."""
    return {w.shape[1] for w in model.layers if w.kind == "linear" and w.shape[1] not in (40, 48)}


@pytest.mark.parametrize(
    "names", [("gate", "up", "down"), ("down",), ("up",), ("gate",), ("gate", "down")], ids=str
)
def test_channels_that_are_zero_are_cut(names: tuple[str, ...], tmp_path: Path) -> None:
    path = save(zeroed(TINY, channels(*names)), tmp_path)
    model = check(path)
    shapes = [w.shape for w in model.layers if w.kind == "linear"]
    assert shapes.count((46, 40)) == 2 and shapes.count((40, 46)) == 1
    assert "26 of 72 channels of layers" in str(inspect(path))


def test_a_channel_with_one_weight_left_stays(tmp_path: Path) -> None:
    def zero(weights: dict[str, np.ndarray]) -> None:
        channels("down")(weights)
        weights["down"][17, 39] = 1e-3

    assert hidden(check(save(zeroed(TINY, zero), tmp_path))) == {47}


def test_a_bias_keeps_a_channel_and_none_lets_it_go(tmp_path: Path) -> None:
    tiny = replace(TINY, bias=True)
    kept = check(save(zeroed(tiny, channels("gate", "up")), tmp_path))
    assert not any("zero and cut" in note for note in kept.notes)
    gone = check(save(zeroed(tiny, channels("gate", "up", "up.bias")), tmp_path))
    assert hidden(gone) == {46}


@pytest.mark.parametrize(
    ("which", "left"),
    [
        ((0, 1), (2, 1)),
        ((1, 2), (2, 2)),
        ((0,), (4, 2)),
        ((0, 1, 3), (1, 1)),
        ((0, 1, 2, 3), (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "other", [{}, {"qk_norm": "own", "mask": "window"}, {"packed_qkv": "parts"}]
)
def test_heads_are_cut_so_that_groups_stay_even(
    which: tuple[int, ...], left: tuple[int, int], other: dict[str, object], tmp_path: Path
) -> None:
    model = check(save(zeroed(replace(TINY, **other), heads(*which)), tmp_path))
    assert (model.num_heads, model.kv) == (left[0], (KvSpec(left[1], 12),))


def test_values_that_are_zero_make_a_head_that_is(tmp_path: Path) -> None:
    def zero(weights: dict[str, np.ndarray]) -> None:
        weights["v"][:, 12:] = 0

    assert check(save(zeroed(TINY, zero), tmp_path)).kv == (KvSpec(1, 12),)


def test_heads_of_a_bias_by_head_go_with_it(tmp_path: Path) -> None:
    tiny = replace(TINY, heads=3, kv_heads=3, rope="", mask="by_distance")
    model = check(save(zeroed(tiny, heads(0)), tmp_path))
    assert model.kv == (KvSpec(2, 12),)


@pytest.mark.parametrize(("names", "width"), [(("down",), 72), (("up", "down"), 46)])
def test_what_a_dynamic_scale_may_depend_on_stays(
    names: tuple[str, ...], width: int, tmp_path: Path
) -> None:
    path = save(zeroed(TINY, channels(*names)), tmp_path)
    quantize_dynamic(path, tmp_path / "int8.onnx")
    assert hidden(check(tmp_path / "int8.onnx", TOKENS[:1])) == {width}


@pytest.mark.parametrize(("at", "width"), [(slice(32, 64), 64), (slice(32, 60), 96)])
def test_groups_of_scales_go_as_a_whole(at: slice, width: int, tmp_path: Path) -> None:
    tiny = replace(TINY, ffn=96)
    model = zeroed(tiny, channels("gate", "up", "down", at=at))
    quantized = matmul_nbits(model, bits=4, block_size=32, is_symmetric=True)
    assert hidden(check(save(quantized, tmp_path))) == {width}


@pytest.mark.slow
def test_a_bundle_is_smaller_and_still_what_onnxruntime_computes(tmp_path: Path) -> None:
    """``compile_model`` compares with onnxruntime before it writes anything."""

    def both(weights: dict[str, np.ndarray]) -> None:
        channels("gate", "up", "down")(weights)
        heads(2, 3)(weights)

    sizes = []
    for zero in (both, lambda _: None):
        path = save(zeroed(TINY, zero), tmp_path, f"m{len(sizes)}.onnx")
        made = compile_model(path, ["x86-64-v3"], output=path.with_suffix(".slm"), context=32)
        plan = plan_model(path, Target.load("x86-64-v3"), context=32)
        sizes.append((made.manifest.weights.bytes, plan.state_bytes, plan.arena_bytes))
    cut, whole = sizes
    assert all(a < b for a, b in zip(cut, whole, strict=True)), sizes
