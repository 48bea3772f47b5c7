"""A mark is found by its key in files and bundles, and by other keys as often as chance has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tokenizers import Tokenizer

import slmtvm
from slmtvm.bundle.encrypt import encrypt_bundle
from slmtvm.bundle.sign import sign_bundle
from slmtvm.bundle.signature import generate_keys, key_signer
from slmtvm.errors import BundleError, InvalidModelError, SlmError
from slmtvm.quantize.accuracy import compare
from slmtvm.target import host_target
from slmtvm.verify import Reference
from slmtvm.watermark import THRESHOLD, Evidence, detect, embed, read_ballot, read_key
from tests.cli.command import slmtvm as command
from tests.importer.graph_builder import save
from tests.importer.graphs import Tiny, build
from tests.models import TOKENIZER, model_path
from tests.models.pycode import DEMO

KEY = b"a secret of thirty-two bytes ..."
KEYS = 1000
TINY = Tiny(hidden=64, heads=4, kv_heads=4, ffn=128, vocab=128, layers=2)


def some_key(number: int) -> bytes:
    return b"another %24d" % number


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in int4, with the mark of ``KEY``."""
    path = tmp_path_factory.mktemp("marked") / "model.onnx"
    report = embed(model_path("demo"), KEY, path)
    assert report.evidence.votes == report.evidence.right > 1000
    assert 0.4 < report.changed / report.scales < 0.6
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of float weights that is quantized in a moment."""
    folder = tmp_path_factory.mktemp("tiny")
    save(build(TINY), folder)
    return folder / "model.onnx"


def test_the_key_finds_its_mark_and_no_key_finds_one_where_there_is_none(marked: Path) -> None:
    assert detect(marked, KEY).log10_p < -300
    assert not detect(model_path("demo"), KEY).found
    assert not detect(marked, some_key(0)).found


@pytest.mark.slow
def test_other_keys_are_right_as_often_as_chance_has_it(marked: Path) -> None:
    """What is said of false positives is true of a marked file, too: p is uniform, or larger."""
    ballot = read_ballot(marked)
    found = np.array([10.0 ** ballot.evidence(some_key(n)).log10_p for n in range(200)])
    for level in (0.5, 0.1, 0.02):
        # Three standard deviations of a binomial distribution above what is promised.
        most = level + 3 * (level * (1 - level) / len(found)) ** 0.5
        assert (found <= level).mean() <= most
    assert found.mean() > 0.4


@pytest.mark.exhaustive
def test_no_key_of_a_thousand_finds_a_mark_by_chance(marked: Path) -> None:
    ballot = read_ballot(marked)
    evidence = [ballot.evidence(some_key(n)) for n in range(KEYS)]
    assert not any(e.found for e in evidence)
    assert min(e.log10_p for e in evidence) > THRESHOLD / 1.5
    assert np.mean([e.right / e.votes for e in evidence]) == pytest.approx(0.5, abs=0.003)


@pytest.mark.slow
def test_the_probability_is_that_of_a_binomial_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    for votes, right in ((1, 1), (10, 3), (64, 50), (2000, 1100), (50_000, 26_000), (100, 0)):
        wanted = stats.binom.logsf(right - 1, votes, 0.5) / np.log(10)
        assert Evidence(votes, right).log10_p == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert Evidence(0, 0).log10_p == 0


def test_no_weight_moves_by_a_fifth_of_a_step(marked: Path) -> None:
    before, after = (onnx.load(str(path)) for path in (model_path("demo"), marked))
    old = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    changed = []
    for tensor in after.graph.initializer:
        new = numpy_helper.to_array(tensor)
        if not np.array_equal(new, old[tensor.name]):
            assert new.dtype == np.float32 == old[tensor.name].dtype
            there = old[tensor.name] != 0
            assert np.array_equal(there, new != 0)
            changed.append(np.abs(new[there] / old[tensor.name][there] - 1).max())
    assert 40 < len(changed) < 60  # the layers, and nothing else
    assert max(changed) * 128 < 0.2
    assert len(before.graph.node) == len(after.graph.node)


@pytest.mark.slow
def test_the_mark_costs_less_than_the_quantization_by_far(marked: Path) -> None:
    text = (DEMO / "heldout.txt").read_text()[:20_000]
    ids = np.array(Tokenizer.from_file(str(TOKENIZER)).encode(text).ids)
    windows = [ids[n : n + 256].astype(np.int64) for n in range(0, 2048, 256)]
    given = onnx.load(str(model_path("demo")))
    quantization = compare(Reference(model_path("float32")), given, windows)
    cost = compare(Reference(model_path("demo")), onnx.load(str(marked)), windows)
    assert cost.kl is not None and cost.ppl_before is not None and cost.ppl_after is not None
    print(f"KL {cost.kl:.2e}, perplexity {cost.ppl_before:.4f} -> {cost.ppl_after:.4f}")
    assert quantization.kl is not None
    print(f"KL of the quantization {quantization.kl:.2e}")
    assert cost.kl < quantization.kl / 20
    assert cost.ppl_after == pytest.approx(cost.ppl_before, rel=1e-3)


@pytest.mark.slow
def test_a_bundle_of_marked_weights_has_the_mark_for_every_target_signed_and_repacked(
    tmp_path: Path, tiny: Path
) -> None:
    """Three architectures order weights differently; nobody has to know how."""
    slmtvm.quantize(tiny, tmp_path / "int4.onnx", group=16)
    embed(tmp_path / "int4.onnx", KEY, tmp_path / "marked.onnx")
    for name in ("int4", "marked"):
        slmtvm.compile(tmp_path / f"{name}.onnx", [host_target().name, "riscv64-rvv"],
                       output=tmp_path / f"{name}.slm", context=32)  # fmt: skip
    bundle = tmp_path / "marked.slm"
    assert detect(bundle, KEY).found
    assert not detect(tmp_path / "int4.slm", KEY).found
    assert not detect(bundle, some_key(1)).found
    generate_keys(tmp_path / "key.pem", tmp_path / "pub.pem")
    sign_bundle(bundle, key_signer(tmp_path / "key.pem"), counter=3, version="3.0")
    moved = shutil.copytree(bundle, tmp_path / "moved.slm")
    assert detect(moved, KEY) == detect(moved / "weights.bin", KEY)
    assert detect(moved, KEY).found
    encrypt_bundle(bundle, bytes(32), tmp_path / "secret.slm")
    with pytest.raises(BundleError, match="its weights are encrypted"):
        detect(tmp_path / "secret.slm", KEY)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (8, 16)])
def test_int4_and_int8_of_groups_take_a_mark(
    bits: int, group: int, tiny: Path, tmp_path: Path
) -> None:
    slmtvm.quantize(tiny, tmp_path / "q.onnx", bits=bits, group=group)
    report = embed(tmp_path / "q.onnx", KEY, tmp_path / "marked.onnx")
    assert report.largest < 0.0015
    assert detect(tmp_path / "marked.onnx", KEY) == report.evidence
    assert report.evidence.found and not detect(tmp_path / "q.onnx", KEY).found


def test_a_file_that_takes_no_mark_says_why_and_nothing_is_written(
    tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(SlmError, match=r"has 0 scales of quantized weights.*too few for a mark"):
        embed(tiny, KEY, tmp_path / "out.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08no onnx")
    with pytest.raises(InvalidModelError, match="no ONNX file"):
        embed(tmp_path / "bad.onnx", KEY, tmp_path / "out.onnx")
    (tmp_path / "short").write_bytes(b"secret")
    with pytest.raises(SlmError, match="6 bytes are no key"):
        read_key(tmp_path / "short")
    with pytest.raises(SlmError, match="no such file"):
        detect(tmp_path / "nowhere", KEY)
    with pytest.raises(SlmError, match="no bundle"):
        detect(tmp_path, KEY)
    assert not detect(tmp_path / "short", KEY).found
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.slow
def test_the_command_says_how_sure_it_is_by_words_and_status(tmp_path: Path, marked: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "other").write_bytes(some_key(5))
    there = command("watermark", "detect", marked, "--key", tmp_path / "key")
    assert there.returncode == 0 and "the mark is there" in there.stdout
    none = command("watermark", "detect", marked, "--key", tmp_path / "other")
    assert none.returncode == 1 and "the mark is not there" in none.stdout
