"""What is compiled is compared with onnxruntime before it becomes a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import slmtvm
from slmtvm import compiler
from slmtvm.cli.compile import INACCURATE
from slmtvm.cli.main import main
from slmtvm.compiler import compile_imported
from slmtvm.errors import AccuracyError, SlmError, UnsupportedOpError
from slmtvm.importer import import_onnx
from slmtvm.ir.model import CanonicalModel
from slmtvm.ir.probing import embedding_norms, probing_tokens
from slmtvm.target import Target
from slmtvm.verify import check as checking
from slmtvm.verify.check import check_line, prepare_check
from slmtvm.verify.reference import Reference
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.models.corpus import corpus_path

TINY = Tiny(rope="rotate_half", heads=4, kv_heads=2, layers=1)
CONTEXT = 40


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(TINY), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(file: Path) -> CanonicalModel:
    return import_onnx(file, context=CONTEXT)


@pytest.fixture(scope="module")
def bundle(model: CanonicalModel, tmp_path_factory: pytest.TempPathFactory) -> slmtvm.Bundle:
    path = tmp_path_factory.mktemp("check") / "model.slm"
    return compile_imported(model, [Target.load("host")], output=path)


@pytest.fixture(scope="module")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph, a projection of it three times as large."""
    proto = build(TINY)
    weight = next(t for t in proto.graph.initializer if list(t.dims) == [TINY.hidden, TINY.ffn])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 3, weight.name))
    return save(proto, tmp_path_factory.mktemp("other"))


def compare(model: CanonicalModel, bundle: slmtvm.Bundle, **options: Any) -> dict[str, Any]:
    check = prepare_check(model, **options)
    check.compare(bundle.path, bundle.targets[0])
    return check.record


def test_the_manifest_says_how_far_the_bundle_is_from_onnxruntime(bundle: slmtvm.Bundle) -> None:
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    record = manifest["extra"]["check"]
    assert record == bundle.manifest.extra["check"]
    assert set(record) == {"tokens", "kl", "cosine", "relative", "onnxruntime"}
    assert record["tokens"] == CONTEXT
    assert record["kl"] == 0 and record["cosine"] == 1 and record["relative"] < 1e-3
    slmtvm.Bundle.open(bundle.path).verify()


def test_the_same_check_gives_the_same_figures(
    model: CanonicalModel, bundle: slmtvm.Bundle
) -> None:
    assert compare(model, bundle) == bundle.manifest.extra["check"]


def test_a_bundle_of_other_numbers_is_refused(
    model: CanonicalModel, bundle: slmtvm.Bundle, other_file: Path
) -> None:
    with pytest.raises(AccuracyError, match=r"differs from onnxruntime over 40 tokens: KL") as told:
        compare(replace(model, source=other_file), bundle)
    message = str(told.value)
    assert message.startswith(f"{other_file}: ") and "\n" not in message
    for words in ("(at most 0.01)", "onnxruntime from itself", "--no-check", "inspect --report"):
        assert words in message


def test_where_onnxruntime_is_as_far_from_itself_there_is_no_fault(
    model: CanonicalModel,
    bundle: slmtvm.Bundle,
    other_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def far(_self: Reference, **_options: Any) -> Reference:
        return Reference(model.source)  # onnxruntime on the file that the bundle is of

    monkeypatch.setattr(Reference, "variant", far)
    record = compare(replace(model, source=other_file), bundle)
    assert record["kl"] > 0.01


def test_where_onnxruntime_is_known_to_be_wrong_there_is_nothing_to_compare_with(
    model: CanonicalModel,
    bundle: slmtvm.Bundle,
    other_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doubtful(path: Path, **options: Any) -> Reference:
        reference = Reference(path, **options)
        reference.doubts = ("it adds wrongly",)
        return reference

    monkeypatch.setattr(checking, "Reference", doubtful)
    assert compare(replace(model, source=other_file), bundle) == {"skipped": "it adds wrongly"}
    assert "skipped" not in compare(model, bundle)  # it agrees all the same


def _fails(error: Exception) -> Callable[..., Any]:
    def call(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("name", "stand_in", "words"),
    [
        ("Reference", _fails(UnsupportedOpError("lacks\nit", where="m")), "m: lacks it"),
        ("Reference", _fails(MemoryError()), "ran out of memory"),
        ("_available_memory", lambda: 1000, "needs about 0.0 GB of memory"),
        ("load", _fails(slmtvm.BundleError("nothing may be executed there")), "executed"),
    ],
)
def test_what_onnxruntime_cannot_run_is_not_checked(
    model: CanonicalModel,
    bundle: slmtvm.Bundle,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stand_in: Callable[..., Any],
    words: str,
) -> None:
    monkeypatch.setattr(checking, name, stand_in)
    record = compare(model, bundle)
    assert set(record) == {"skipped"} and words in record["skipped"]
    assert check_line(record) == f"not checked: {record['skipped']}"


@pytest.mark.slow
def test_a_failed_check_leaves_nothing_and_ends_with_a_code_of_its_own(
    file: Path,
    model: CanonicalModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = next(n for n, value in model.params.items() if value.shape == (TINY.vocab, TINY.hidden))
    wrong = replace(model, params={**model.params, name: model.params[name] * np.float32(-1)})
    monkeypatch.setattr(compiler, "import_onnx", lambda *_args, **_options: wrong)
    output = tmp_path / "model.slm"
    assert main(["compile", str(file), "-o", str(output)]) == INACCURATE
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith(f"slmtvm: error: {file}: the compiled model")
    assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert main(["compile", str(file), "-o", str(output), "--no-check"]) == 0
    assert "checked" not in capfd.readouterr().out
    assert slmtvm.Bundle.open(output).manifest.extra == {}


@pytest.mark.slow
def test_for_another_machine_a_build_for_this_one_is_checked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, bool]] = []
    compare = checking.Check.compare

    def watched(self: checking.Check, folder: Path, target: str) -> None:
        compared.append((target, folder.is_relative_to(tmp_path)))
        compare(self, folder, target)

    monkeypatch.setattr(checking.Check, "compare", watched)
    bundle = slmtvm.compile(file, ["riscv64-rvv"], output=tmp_path / "x.slm", context=CONTEXT)
    assert compared == [(Target.load("host").name, False)]
    assert bundle.targets == ("riscv64-rvv",)
    # A float32 cache, as the target has it: float16 would show.
    assert bundle.manifest.extra["check"]["relative"] == 0


@pytest.mark.parametrize(
    ("names", "kv", "dtypes"),
    [
        (("host",), None, {"float16": True}),
        (("host", "riscv64-rvv"), None, {"float16": True, "float32": False}),
        (("host", "riscv64-rvv"), "int8", {"int8": True}),
        (("cortex-a72", "cortex-a78"), None, {"float16": False}),
    ],
)
def test_each_type_of_cache_is_checked_once(
    model: CanonicalModel, names: tuple[str, ...], kv: str | None, dtypes: dict[str, bool]
) -> None:
    found = compiler._to_check([Target.load(name) for name in names], model, kv)
    runs = {dtype: name is not None for dtype, name in found.items()}
    assert runs == dtypes or Target.load("host").arch != "x86_64"


@pytest.mark.parametrize(
    ("cell", "name", "kind"),
    [
        ("bert-optimum", "model.onnx", "encoder"),
        ("t5-optimum", "decoder_model.onnx", "encoder-decoder"),
        ("llama-builder-int4", "model.onnx", "decoder"),
    ],
)
def test_the_tokens_are_random_ones_and_those_with_the_largest_embeddings(
    cell: str, name: str, kind: str
) -> None:
    model = import_onnx(corpus_path(cell, name), context=30)
    assert model.kind == kind
    tokens = probing_tokens(model, 20)
    assert np.array_equal(tokens, probing_tokens(model, 20))
    norms = embedding_norms(model, "main")
    assert norms is not None
    largest = np.argsort(-norms)[:10]
    assert set(largest) <= set(tokens.tolist())
    assert not set(tokens.tolist()) & set(model.padding)


def test_the_norms_are_those_of_the_files_table(file: Path, model: CanonicalModel) -> None:
    table = next(
        numpy_helper.to_array(t)
        for t in onnx.load(file).graph.initializer
        if t.name == "embedding.weight"
    )
    np.testing.assert_allclose(
        embedding_norms(model, "main"), np.linalg.norm(table, axis=1), rtol=1e-5
    )


def test_tokens_may_be_given(model: CanonicalModel, bundle: slmtvm.Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(30).reshape(2, 15))
    for tokens in (tmp_path / "ids.npy", np.arange(30).reshape(2, 15)):
        assert compare(model, bundle, tokens=tokens)["tokens"] == 28


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.array([1, 2, 999]), "token 999 is out of the vocabulary, which has 0 to 52"),
        (np.array([0.5, 1.0]), "integers (n,) or (windows, n) are needed"),
        (b"no array", "not a .npy file"),
        (None, "no such file"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused_before_anything_is_compiled(
    file: Path, tmp_path: Path, content: np.ndarray | bytes | None, words: str
) -> None:
    path = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    steps: list[str] = []
    with pytest.raises(SlmError) as told:
        slmtvm.compile(
            file, output=tmp_path / "x.slm", context=CONTEXT, check_tokens=path,
            progress=steps.append,
        )  # fmt: skip
    assert str(told.value).startswith(f"{path}: ") and words in str(told.value)
    assert steps == ["import"]


def test_a_text_needs_a_tokenizer(model: CanonicalModel, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):")
    with pytest.raises(SlmError, match=r"text\.txt: there is no tokenizer"):
        prepare_check(model, tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"tokens": 64, "kl": 2.1e-4}, "checked: KL 2e-4 over 64 tokens"),
        ({"tokens": 64, "kl": 0.0}, "checked: KL under 1e-6 over 64 tokens"),
        ({"tokens": 9, "cosine": 0.99987}, "checked: cosine 0.99987 over 9 tokens"),
    ],
)
def test_a_line_says_what_was_found(record: dict[str, Any], line: str) -> None:
    assert check_line(record) == line
