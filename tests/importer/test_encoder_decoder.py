"""Encoder-decoders, as one graph and as two files, against onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import slmtvm
from slmtvm.errors import InvalidModelError, SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.ops import parse_roundings
from slmtvm.ir.reference import encode_source, evaluate
from slmtvm.verify.reference import Reference
from tests.importer.graph_builder import GraphBuilder, save
from tests.importer.spellings import MASKS, NORMS
from tests.importer.test_import_spellings import calls_of

VOCAB, DIM, HEADS, HEAD_DIM, FFN = 61, 40, 3, 24, 50
WIDTH = HEADS * HEAD_DIM
RNG = np.random.default_rng(5)
SOURCE, TOKENS = RNG.integers(0, VOCAB, 13), RNG.integers(0, VOCAB, 9)


class Builder(GraphBuilder):
    """The parts of an encoder-decoder; ``batch`` is where sizes of reshapes are taken from."""

    more_inputs: tuple[onnx.ValueInfoProto, ...] = ()  # of one file, next to both tokens

    def embed(self, table: str, ids: str) -> str:
        return self.op("Gather", table, ids)

    def scaled(self, queries: str, keys: str) -> tuple[str, str]:
        return queries, keys

    def over_source(self, scores: str) -> str:
        return scores

    def heads(self, x: str, batch: str) -> str:
        size = self.op("Shape", batch, start=0, end=1)
        shape = self.op("Concat", size, self.ints(-1, HEADS, HEAD_DIM), axis=0)
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def attention(self, x: str, memory: str, mask: str | None, batch: str) -> str:
        q, k, v = (
            self.heads(self.op("MatMul", value, self.weight(DIM, WIDTH)), batch)
            for value in (x, memory, memory)
        )
        q, k = self.scaled(q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("MatMul", q, k)
        if mask is not None:
            scores = MASKS[mask][0](self, scores, self.op("Shape", x, start=1, end=2))
        else:
            scores = self.over_source(scores)
        weights = self.op("Softmax", scores, axis=-1)
        joined = self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        flat = self.op("Reshape", joined, self.ints(0, 0, WIDTH))
        return self.op("MatMul", flat, self.weight(WIDTH, DIM))

    def norm(self, x: str) -> str:
        return NORMS["rms_rsqrt"](self, x, DIM)

    def feed_forward(self, x: str) -> str:
        inner = self.op("Relu", self.op("MatMul", x, self.weight(DIM, FFN)))
        return self.op("MatMul", inner, self.weight(FFN, DIM))


def encoder(b: Builder, ids: str, table: str, batch: str) -> str:
    x = b.embed(table, ids)
    n = b.norm(x)
    x = b.op("Add", x, b.attention(n, n, None, batch))
    x = b.op("Add", x, b.feed_forward(b.norm(x)))
    return b.norm(x)


def decoder(b: Builder, ids: str, table: str, hidden: str, late_batch: bool) -> str:
    x = b.embed(table, ids)
    for _ in range(2):
        n = b.norm(x)
        x = b.op("Add", x, b.attention(n, n, "trilu", ids))
        # Optimum takes the batch of the source's keys from the decoder's rows.
        x = b.op("Add", x, b.attention(b.norm(x), hidden, None, x if late_batch else hidden))
        x = b.op("Add", x, b.feed_forward(b.norm(x)))
    return b.op("MatMul", b.norm(x), b.op("Transpose", table, perm=[1, 0]))


def ids_port(name: str):
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", f"{name}_length"])


def finish(b: Builder, inputs, value: str, name: str, width: int) -> onnx.ModelProto:
    b.op("Identity", value)
    b.nodes[-1].output[0] = name
    dims = ["batch", "length", width]
    return b.model(inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)])


def one_file(folder: Path, *, late_batch: bool, kind: type[Builder] = Builder) -> Path:
    b = kind(np.random.default_rng(0))
    table = b.near(0, VOCAB, DIM, name="shared")
    source, target = "input_ids", "decoder_input_ids"
    # torch.onnx.export takes the batch of everything from one of the two inputs.
    hidden = encoder(b, source, table, target)
    logits = decoder(b, target, table, hidden, late_batch)
    inputs = [ids_port(source), ids_port(target), *b.more_inputs]
    return save(finish(b, inputs, logits, "logits", VOCAB), folder)


def two_files(folder: Path, kind: type[Builder] = Builder) -> Path:
    b = kind(np.random.default_rng(0))
    table = b.near(0, VOCAB, DIM, name="shared")
    hidden = encoder(b, "input_ids", table, "input_ids")
    first = finish(b, [ids_port("input_ids")], hidden, "last_hidden_state", DIM)
    save(first, folder, "encoder_model.onnx")
    b = kind(np.random.default_rng(0))
    table = b.near(0, VOCAB, DIM, name="shared")
    states = helper.make_tensor_value_info(
        "encoder_hidden_states", TensorProto.FLOAT, ["batch", "source_length", DIM]
    )
    logits = decoder(b, "input_ids", table, states.name, True)
    second = finish(b, [ids_port("input_ids"), states], logits, "logits", VOCAB)
    return save(second, folder, "decoder_model.onnx")


WAYS = {
    "one file": lambda folder: one_file(folder, late_batch=False),
    "one file, sizes from the decoder": lambda folder: one_file(folder, late_batch=True),
    "two files": two_files,
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_onnxruntime_s(way, tmp_path):
    path = WAYS[way](tmp_path)
    model = import_onnx(path)
    assert (model.kind, model.source_context) == ("encoder-decoder", 512)
    assert set(model.params) >= {"shared"}, "the table is stored once"
    want = Reference(path).rows(TOKENS, SOURCE)
    assert np.abs(evaluate(model, TOKENS, SOURCE) - want).max() < 1e-5 * np.ptp(want)


def test_the_source_s_hidden_states_are_the_encoder_file_s(tmp_path):
    model = import_onnx(two_files(tmp_path))
    want = Reference(tmp_path / "encoder_model.onnx").rows(SOURCE)
    assert np.abs(encode_source(model, SOURCE) - want).max() < 1e-5 * np.ptp(want)


def test_an_encoder_may_have_any_name(tmp_path):
    path = two_files(tmp_path)
    want = Reference(path).rows(TOKENS, SOURCE)
    other = tmp_path / "elsewhere.onnx"
    (tmp_path / "encoder_model.onnx").rename(other)
    with pytest.raises(InvalidModelError, match="name its encoder's file with --encoder"):
        import_onnx(path)
    model = import_onnx(path, encoder=other)
    assert np.abs(evaluate(model, TOKENS, SOURCE) - want).max() < 1e-5 * np.ptp(want)
    assert np.array_equal(Reference(path, encoder=other).rows(TOKENS, SOURCE), want)
    with pytest.raises(SlmError, match="this model reads none"):
        import_onnx(other, encoder=path)


def test_a_source_that_reaches_nothing_is_named(tmp_path):
    path = one_file(tmp_path, late_batch=False)
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = ["decoder_input_ids" if i == "input_ids" else i for i in node.input]
    with pytest.raises(UnsupportedOpError, match=r"no output depends on .* 'input_ids'"):
        import_onnx(save(model, tmp_path, "same.onnx"))


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with all scores that no mask was added to, and their softmax, rounded."""
    makers = {o: n for n in model.graph.node for o in n.output}
    for name, scale, zero in (("scores", 0.11, 130), ("weights", 1 / 255, 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), f"{name}.scale"))
        model.graph.initializer.append(numpy_helper.from_array(np.uint8(zero), f"{name}.zero"))
    for softmax in [n for n in model.graph.node if n.op_type == "Softmax"]:
        if makers[softmax.input[0]].op_type != "MatMul":
            continue
        (reader,) = [n for n in model.graph.node if softmax.output[0] in n.input]
        for node, name in ((reader, "weights"), (softmax, "scores")):
            at, x = list(model.graph.node).index(node), node.input[0]
            given = [f"{name}.scale", f"{name}.zero"]
            back = helper.make_node("DequantizeLinear", [f"{x}.q", *given], [f"{x}.r"])
            model.graph.node.insert(at, back)
            there = helper.make_node("QuantizeLinear", [x, *given], [f"{x}.q"])
            model.graph.node.insert(at, there)
            node.input[0] = f"{x}.r"
    return model


def with_rounded_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with both sides of every product of two values rounded."""
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.03), "heads.scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(128), "heads.zero"))
    constants = {t.name for t in model.graph.initializer}
    given = ["heads.scale", "heads.zero"]
    for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
        if constants.intersection(node.input):
            continue
        for place, x in enumerate(node.input):
            name, at = f"{node.name}.{place}", list(model.graph.node).index(node)
            back = helper.make_node("DequantizeLinear", [f"{name}.q", *given], [f"{name}.r"])
            model.graph.node.insert(at, back)
            there = helper.make_node("QuantizeLinear", [x, *given], [f"{name}.q"])
            model.graph.node.insert(at, there)
            node.input[place] = f"{name}.r"
    return model


def check_rounded(path: Path, median: float = 1e-5) -> None:
    got = evaluate(import_onnx(path), TOKENS, SOURCE)
    want = Reference(path).rows(TOKENS, SOURCE)
    errors = np.abs(got - want).max(axis=1) / np.ptp(want)
    assert np.median(errors) <= median
    assert errors.max() <= 2e-2  # a last bit of a float can turn a rounding


@pytest.mark.parametrize("late_batch", [False, True])
def test_keys_and_values_of_a_source_may_be_rounded(late_batch, tmp_path):
    path = save(with_rounded_heads(onnx.load(one_file(tmp_path, late_batch=late_batch))), tmp_path)
    check_rounded(path)


def test_what_is_moved_and_rounded_may_be_an_output_before(tmp_path):
    """As optimum gives keys and values out for the next step."""
    model = with_rounded_heads(onnx.load(one_file(tmp_path, late_batch=True)))
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        if any(n.op_type == "Transpose" and node.input[0] in n.output for n in model.graph.node):
            dims = ["batch", None, None, None]
            info = helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, dims)
            model.graph.output.append(info)
    assert len(model.graph.output) > 6
    check_rounded(save(model, tmp_path))


class Calibration(CalibrationDataReader):
    """One call."""

    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self._left = [feeds]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def quantized(folder: Path, quant_format: QuantFormat, way: str) -> Path:
    """A model whose matrix products and moves are all rounded."""
    source, text = SOURCE[None], TOKENS[None]
    path = WAYS[way](folder)
    feeds = {path: {"input_ids": source, "decoder_input_ids": text}}
    if way == "two files":
        first = folder / "encoder_model.onnx"
        states = Reference(first).rows(SOURCE)[None]
        feeds = {first: {"input_ids": source}}
        feeds[path] = {"input_ids": text, "encoder_hidden_states": states}
    logging.getLogger().setLevel(logging.ERROR)
    for file, given in feeds.items():
        float_file = file.rename(folder / "float.onnx")
        quantize_static(
            float_file, file, Calibration(given), quant_format=quant_format,
            op_types_to_quantize=["MatMul", "Reshape", "Transpose"],
        )  # fmt: skip
    return path


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quant_format", QuantFormat, ids=str)
def test_every_move_of_keys_and_values_may_be_rounded(way, quant_format, tmp_path):
    check_rounded(quantized(tmp_path, quant_format, way), median=2e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_roundings_of_a_cross_attention_are_kept(compiled, tmp_path):
    path = save(rounded(onnx.load(one_file(tmp_path, late_batch=False))), tmp_path)
    model = import_onnx(path)
    for call in calls_of(model, "slm.cross_attention"):
        for attr in ("roundings", "weight_roundings"):
            assert len(parse_roundings(str(call.attrs[attr]))) == 1
    if compiled:
        slmtvm.compile(path, ["host"], output=tmp_path / "t.slm", context=64, kv="f32")
        with slmtvm.load(tmp_path / "t.slm") as session:
            session.encode(SOURCE)
            got = session.eval_all(TOKENS)
    else:
        got = evaluate(model, TOKENS, SOURCE)
    want = Reference(path).rows(TOKENS, SOURCE)
    errors = np.abs(got - want).max(axis=1) / np.ptp(want)
    assert np.median(errors) <= 1e-5
    assert errors.max() <= 2e-2  # a last bit of a float can turn a rounding


def test_a_source_may_be_as_long_as_is_asked_for(tmp_path):
    path = two_files(tmp_path)
    model = import_onnx(path, source_context=700)
    assert model.source_context == 700
    source = RNG.integers(0, VOCAB, 650)
    want = Reference(path).rows(TOKENS, source)
    assert np.abs(evaluate(model, TOKENS, source) - want).max() < 1e-5 * np.ptp(want)
    with pytest.raises(SlmError, match=r"encoder_model\.onnx: a source of 9 .* reads no source"):
        import_onnx(tmp_path / "encoder_model.onnx", source_context=9)


@pytest.mark.slow
def test_it_compiles_and_verifies(tmp_path):
    path = two_files(tmp_path)
    (tmp_path / "config.json").write_text('{"decoder_start_token_id": 2, "eos_token_id": 3}')
    slmtvm.compile(path, ["host"], output=tmp_path / "t.slm", context=64, kv="f32")
    with slmtvm.load(tmp_path / "t.slm") as session:
        assert (session.info["start"], session.info["end"]) == (2, [3])
    report = slmtvm.verify(tmp_path / "t.slm", path, tokens=RNG.integers(0, VOCAB, 100), window=33)
    assert report.kl_mean < 1e-6
    assert report.top1 == 1


def test_a_decoder_without_its_encoder_says_what_is_missing(tmp_path):
    path = two_files(tmp_path)
    (tmp_path / "encoder_model.onnx").unlink()
    with pytest.raises(InvalidModelError, match=r"no encoder_model\.onnx beside it"):
        import_onnx(path)


def test_a_decoder_that_cannot_begin_names_the_file_that_can(tmp_path):
    b = Builder(np.random.default_rng(0))
    x = b.op("Gather", b.near(0, VOCAB, DIM), "input_ids")
    past = helper.make_tensor_value_info(
        "past_key_values.0.encoder.key", TensorProto.FLOAT, ["batch", HEADS, "source", HEAD_DIM]
    )
    x = b.op("Add", x, b.op("ReduceMean", past.name))
    path = save(finish(b, [ids_port("input_ids"), past], x, "logits", DIM), tmp_path)
    with pytest.raises(UnsupportedOpError, match=r"compile decoder_model\.onnx or"):
        import_onnx(path)


def test_a_decoder_that_adds_hidden_states_to_its_rows_is_refused(tmp_path):
    b = Builder(np.random.default_rng(0))
    table = b.near(0, VOCAB, DIM, name="shared")
    hidden = encoder(b, "input_ids", table, "input_ids")
    x = b.op("Gather", table, "decoder_input_ids")
    x = b.op("Add", x, b.op("ReduceMean", hidden, b.ints(1), keepdims=1))
    logits = decoder(b, "decoder_input_ids", table, hidden, False)
    logits = b.op("Add", logits, b.op("MatMul", x, b.weight(DIM, VOCAB)))
    inputs = [ids_port("input_ids"), ids_port("decoder_input_ids")]
    path = save(finish(b, inputs, logits, "logits", VOCAB), tmp_path)
    with pytest.raises(UnsupportedOpError, match="outside of a cross-attention"):
        import_onnx(path)


class Positive(Builder):
    """Keys are positive, those of the source too."""

    def scaled(self, q: str, k: str) -> tuple[str, str]:
        return q, self.op("Abs", k)


def test_what_is_done_to_keys_of_a_source_is_done_while_the_source_is_read(tmp_path):
    check_rounded(one_file(tmp_path, late_batch=False, kind=Positive))


def test_what_a_decoder_does_to_keys_of_its_source_is_refused_by_name(tmp_path):
    path = one_file(tmp_path, late_batch=True, kind=Positive)
    with pytest.raises(UnsupportedOpError, match=r"Abs node.*changes keys or values of the source"):
        import_onnx(path)
