"""What a device computes of a bundle has the bits that this machine computes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slmtvm.bundle.write import write_bundle
from slmtvm.errors import BundleError, DeviceError, TargetError
from slmtvm.passes.pipeline import fuse, lower
from slmtvm.plan.build import build_plan
from slmtvm.rpc.client import Device
from slmtvm.rpc.device_bundle import DeviceBundle
from slmtvm.rpc.local import local_device
from slmtvm.runtime import load
from slmtvm.target import Target
from slmtvm.verify import on_device
from slmtvm.verify.on_device import DeviceSession
from tests.passes import toy
from tests.runtime.toy import VOCAB, toy_decoder, toy_encoder
from tests.schedules.harness import emulators

pytestmark = pytest.mark.slow
HOST = Target.load("host")
MAKERS = {"decoder": toy_decoder, "encoder": toy_encoder}


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with local_device("--memory", "500M") as device:
        yield device


def _ids(count: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(count).integers(0, vocab, count).astype(np.int32)


def _same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("mask", ["none", "keys", "skip"])
def test_a_decoder_has_the_same_rows_in_any_division(
    mask: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "_MOST_ROWS_BYTES", 4 * VOCAB * 5)  # several jobs a call
    write_bundle(tmp_path / "x.slm", [(HOST, toy_decoder(mask=mask))])
    there = DeviceSession(DeviceBundle(device, tmp_path / "x.slm"))
    ids, hidden = _ids(23), np.arange(23) % 4 != 1
    masks = (None,) if mask == "none" else (None, hidden)
    with load(tmp_path / "x.slm") as here:
        assert there.info == here.info
        for visible in masks:
            here.reset(), there.reset()
            for part in (slice(0, 17), slice(17, 18), slice(18, 23)):
                given = (ids[part],) if visible is None else (ids[part], visible[part])
                _same(there.eval_all(*given), here.eval_all(*given))
            here.reset(), there.reset()
            whole = (ids,) if visible is None else (ids, visible)
            for name, row in here.outputs(*whole).items():
                _same(there.outputs(*whole)[name], row)
                there.reset()


@pytest.mark.parametrize("mask", ["none", "keys"])
def test_an_encoder_has_the_same_outputs(mask: str, device: Device, tmp_path: Path) -> None:
    write_bundle(tmp_path / "x.slm", [(HOST, toy_encoder(mask=mask))])
    there = DeviceSession(DeviceBundle(device, tmp_path / "x.slm"), threads=2)
    ids, tail = _ids(13), np.arange(13) < 9
    with load(tmp_path / "x.slm") as here:
        for given in ((ids,), (ids, tail)):
            _same(there.encode(*given), here.encode(*given))
            for name, rows in here.outputs(*given).items():
                _same(there.outputs(*given)[name], rows)


@pytest.mark.parametrize("name", ["cortex-a78", "riscv64-rvv"])
def test_an_emulated_board_computes_the_bits_of_this_machine(name: str, tmp_path: Path) -> None:
    targets = [HOST, Target.load(name)]
    model = fuse(toy.decoder("int4"))
    path = tmp_path / "x.slm"
    # Targets differ in what a cache's values are rounded to unless that is said.
    write_bundle(path, [(t, build_plan(lower(model, t, "float32"), {})) for t in targets])
    emulator = " ".join(emulators(targets[1])[0])
    with local_device("--exec", emulator, "--memory", "2G") as board, load(path) as here:
        there = DeviceBundle(board, path, name)
        assert there.target == name
        ids = _ids(40, toy.VOCAB)
        _same(DeviceSession(there).eval_all(ids), here.eval_all(ids))


def test_what_a_device_cannot_do_is_said(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "x.slm"
    write_bundle(path, [(HOST, toy_decoder())])
    with pytest.raises(BundleError, match="no library for target 'none'; there are"):
        DeviceBundle(device, path, "none")
    there = DeviceSession(DeviceBundle(device, path))
    with pytest.raises(DeviceError, match=f"ended with status 2: slm-device: .*{VOCAB}"):
        there.eval_all(np.array([VOCAB], np.int32))
    program = DeviceBundle(device, path)
    for arguments, request, said in (
        (("eval", "1"), b"", "the request is cut off"),
        (("eval", "1"), struct.pack("<5i", 0, 0, 3, 0, 0) + bytes(4), "the request is cut off"),
        (("eval", "1"), struct.pack("<5i", 0, 0, 3, 3, 0) + bytes(12), "the request is none"),
        (("eval", "x"), b"", "x is no number from 0 to 256"),
        (("bench", "1", "0", "0", "decode:49:100"), b"", "usage: slm-device"),
        (("bench", "1", "0", "0", "prefill:0:1:1"), b"", "usage: slm-device"),
        (("load", "0", "9999"), b"", "9999 is no number from 1 to"),
        (("none",), b"", "usage: slm-device"),
    ):
        with pytest.raises(DeviceError, match=said):
            program.run(*arguments, stdin=request)
    foreign = Target.load("cortex-a78" if HOST.arch != "aarch64" else "riscv64-rvv")
    write_bundle(tmp_path / "y.slm", [(foreign, toy_decoder())])
    with pytest.raises(TargetError, match=f"runs nothing of this bundle: {foreign.name}: it is"):
        DeviceBundle(device, tmp_path / "y.slm")
