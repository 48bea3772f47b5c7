"""A pruned model, compiled with and without skipping its zeros, against each other and onnxruntime.

Whole blocks of the demo model's int8 weights are zero, as tools for block pruning leave them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import slmtvm
from slmtvm.bundle import Bundle
from slmtvm.compiler import compile_model
from slmtvm.errors import BundleError
from slmtvm.schedules.linear.packed_rows import pack_rows, unpack_rows
from slmtvm.target import Target
from slmtvm.verify.exact_sums import exact_session
from tests.emulation.session import open_sessions
from tests.end_to_end.reference import Reference, mean_kl
from tests.machines import runnable_targets
from tests.models import TOKENIZER, heldout_ids, model_path

SHARE = 0.7
CHANNELS, K = 8, 4
SHORT_SHARE = 0.85  # of blocks of one channel
KERNEL_OF_PAIRS = {"x86-64-v3": "4of8", "cortex-a78": "dense"}
LAYERS = 6
MOST_K = 768  # of the layers behind the gates
CONTEXT = 64
TARGETS = ("x86-64-v3", "cortex-a78")
TOKENS = 21  # a chunk of 16 and some single ones
MAX_KL = 1e-2  # as for the model that is not pruned


def pruned(
    path: Path, output: Path, block: tuple[int, int] = (CHANNELS, K), share: float = SHARE
) -> Path:
    """The model with those blocks of its layers' weights at zero that hold the least; of the
    layers with most inputs, the smaller two of every four neighbours, but for one weight of the
    first, which breaks the pattern, and for the last, of which most short blocks go."""
    model, seen = onnx.load(path), 0
    given = {i: node for node in model.graph.node for i in node.input}
    for tensor in model.graph.initializer:
        node = given.get(tensor.name)
        if node is None or node.op_type != "MatMulInteger" or len(tensor.dims) != 2:
            continue
        weight = numpy_helper.to_array(tensor)  # (k, n)
        k, n = weight.shape
        if k == MOST_K:
            fours = weight.reshape(k // 4, 4, n).copy()
            seen += 1
            if seen == LAYERS:
                size = (fours.astype(np.int32) ** 2).sum(axis=1)
                fours *= (size > np.quantile(size, SHORT_SHARE))[:, None]
                short = numpy_helper.from_array(fours.reshape(k, n), tensor.name)
                tensor.CopyFrom(short)
                continue
            order = np.abs(fours.astype(np.int32)).argsort(axis=1).argsort(axis=1)
            fours[order < 2] = 0
            if seen == 1:
                fours[k // 8, order[k // 8, :, 3].argmin(), 3] = 1
            tensor.CopyFrom(numpy_helper.from_array(fours.reshape(k, n), tensor.name))
            continue
        split = weight.reshape(k // block[1], block[1], n // block[0], block[0]).astype(np.int32)
        size = (split**2).sum(axis=(1, 3))
        split = split * (size > np.quantile(size, share))[:, None, :, None]
        tensor.CopyFrom(
            numpy_helper.from_array(split.reshape(k, n).astype(weight.dtype), tensor.name)
        )
    onnx.save(model, output)
    return output


@dataclass(frozen=True)
class Compiled:
    model: Path
    auto: Bundle
    off: Bundle
    free: Bundle


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("sparse")
    model = pruned(model_path("int8"), folder / "pruned.onnx")
    bundles = [
        compile_model(
            model, targets, output=folder / f"{mode}.slm", context=CONTEXT, tokenizer=TOKENIZER,
            kv="f32", sparse=mode, check=False,
        )
        for mode, targets in (("auto", TARGETS), ("off", TARGETS[:1]), ("free", TARGETS[:1]))
    ]  # fmt: skip
    return Compiled(model, *bundles)


def logits(bundle: Bundle, folder: Path, count: int = TOKENS) -> Iterator[tuple[str, np.ndarray]]:
    """The logits after each token, for every target that runs here and some threads."""
    tokens = heldout_ids()[:count]
    for target in runnable_targets(bundle.targets):
        for session in open_sessions(bundle.path, Target.load(target.name), folder):
            yield target.name, session.eval_all(tokens, count)


@pytest.mark.slow
def test_skipping_zeros_changes_no_bit_on_any_target(compiled: Compiled, tmp_path: Path) -> None:
    bundles = (compiled.auto, compiled.off, compiled.free)
    found = [given for bundle in bundles for given in logits(bundle, tmp_path)]
    assert len(found) >= len(bundles), found
    for where, values in found[1:]:
        np.testing.assert_array_equal(values, found[0][1], err_msg=where)


@pytest.mark.slow
def test_a_pruned_model_computes_what_onnxruntime_does(compiled: Compiled, tmp_path: Path) -> None:
    tokens, options = heldout_ids()[:TOKENS], ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = Reference(exact_session(compiled.model, options)).logits(tokens)
    _, given = next(logits(compiled.auto, tmp_path))
    assert mean_kl(expected, given) <= MAX_KL


@pytest.mark.slow
def test_zeros_take_no_room_and_the_manifest_says_so(compiled: Compiled) -> None:
    auto, off = compiled.auto.manifest, compiled.off.manifest
    # Of the pairs, which are 6 bits a weight, the other target holds a dense copy.
    assert auto.weights.bytes < 0.7 * off.weights.bytes
    assert "sparse" not in off.extra
    assert set(auto.extra["sparse"]) == set(TARGETS)
    for target, layers in auto.extra["sparse"].items():
        kernels = Counter(layer["kernel"] for layer in layers)
        assert set(kernels) == {"blocks", KERNEL_OF_PAIRS[target], "rows"}
        # The broken one has no pattern, and the last one another.
        assert (kernels[KERNEL_OF_PAIRS[target]], kernels["rows"]) == (LAYERS - 2, 1)
        assert all(
            0.25 < layer["density"] < 0.35 for layer in layers if layer["kernel"] == "blocks"
        )
    assert auto.model == off.model
    (free,) = compiled.free.manifest.extra["sparse"][TARGETS[0]]
    assert free["kernel"] == "free" and 0.15 < free["density"] < 0.2


@pytest.mark.slow
def test_damaged_places_are_refused_though_nobody_asks(compiled: Compiled, tmp_path: Path) -> None:
    for name, bundle in (("auto", compiled.auto), ("off", compiled.off)):
        path = shutil.copytree(bundle.path, tmp_path / f"{name}.slm")
        weights = path / "weights.bin"
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 0x40
        weights.write_bytes(content)
        if name == "off":
            slmtvm.load(path, target="x86-64-v3", check=False).close()
            continue
        with pytest.raises(BundleError, match="checksum"):
            slmtvm.load(path, target="x86-64-v3", check=False)


@pytest.mark.exhaustive
def test_columns_change_no_bit_on_riscv(tmp_path: Path) -> None:
    model = pruned(model_path("int8"), tmp_path / "pruned.onnx", block=(16, 1), share=0.5)
    found, bundles = [], []
    for mode, target in (("auto", "riscv64-rvv"), ("off", TARGETS[0])):
        bundle = compile_model(
            model, [target], output=tmp_path / f"{mode}.slm", context=CONTEXT,
            tokenizer=TOKENIZER, kv="f32", sparse=mode, check=False,
        )  # fmt: skip
        bundles.append(bundle)
        found += [*logits(bundle, tmp_path)]
    assert len(found) >= 3, "registers of two lengths, and x86-64"
    for where, values in found[1:]:
        np.testing.assert_array_equal(values, found[-1][1], err_msg=where)
    kernels = Counter(
        layer["kernel"] for layer in bundles[0].manifest.extra["sparse"]["riscv64-rvv"]
    )
    assert kernels["columns"] > 2 * LAYERS
    assert bundles[0].manifest.weights.bytes < 0.85 * bundles[1].manifest.weights.bytes


def pruned_int4(path: Path, output: Path) -> Path:
    """The model with the smaller two of every four neighbours of its int4 weights at zero."""
    model = onnx.load(path)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            continue
        stored = numpy_helper.to_array(tensor)  # (n, groups, bytes)
        plain = unpack_rows(stored.reshape(len(stored), -1), stored[0].size * 2, 4).astype(int) - 8
        fours = plain.reshape(len(plain), -1, 4)
        order = np.abs(fours).argsort(axis=2, kind="stable").argsort(axis=2)
        fours[order < 2] = 0
        packed = pack_rows((fours.reshape(plain.shape) + 8).astype(np.uint8), 4)
        tensor.CopyFrom(numpy_helper.from_array(packed.reshape(stored.shape), tensor.name))
    onnx.save(model, output)
    return output


@pytest.mark.slow
def test_pairs_of_int4_change_no_bit_and_take_less_room(tmp_path: Path) -> None:
    model = pruned_int4(model_path("int4"), tmp_path / "pruned.onnx")
    auto, off = (
        compile_model(
            model, TARGETS[:1], output=tmp_path / f"{mode}.slm", context=2 * CONTEXT,
            tokenizer=TOKENIZER, kv="f32", sparse=mode, check=False,
        )
        for mode in ("auto", "off")
    )  # fmt: skip
    kernels = {layer["kernel"] for layer in auto.manifest.extra["sparse"][TARGETS[0]]}
    assert kernels == {"2of4"}
    # The table of tokens, in float32, is most of both.
    assert auto.manifest.weights.bytes < off.manifest.weights.bytes - 500_000
    # A chunk of 128, of which some are padding; one of 16, and single ones.
    for count in (2 * CONTEXT - 20, TOKENS):
        found = [v for bundle in (auto, off) for _, v in logits(bundle, tmp_path, count)]
        for values in found[1:]:
            np.testing.assert_array_equal(values, found[0])
