"""Files in a model hub's cache, where every file is a link to a blob."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from slmtvm.errors import InvalidModelError
from slmtvm.importer import import_onnx
from slmtvm.importer.read.hub import follow_links
from slmtvm.inspect import write_report
from tests.importer.graphs import Tiny, build


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """snapshots/abc/onnx/model.onnx with its data, as links to blobs."""
    model = build(Tiny())
    onnx.save(model, str(tmp_path / "whole.onnx"))
    onnx.save(
        model, str(tmp_path / "model.onnx"), save_as_external_data=True,
        location="model.onnx_data", size_threshold=1000,
    )  # fmt: skip
    assert (tmp_path / "model.onnx_data").stat().st_size > 0
    folder = tmp_path / "hub" / "snapshots" / "abc" / "onnx"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for name, blob in (("model.onnx", "1f"), ("model.onnx_data", "2e")):
        (tmp_path / name).rename(tmp_path / "hub" / "blobs" / blob)
        (folder / name).symlink_to(Path("../../../blobs") / blob)
    return folder / "model.onnx"


def test_links_to_blobs_are_followed(snapshot: Path, tmp_path: Path) -> None:
    linked = import_onnx(snapshot, context=48)
    whole = import_onnx(tmp_path / "whole.onnx", context=48)
    assert linked.params.keys() == whole.params.keys()
    for name, value in whole.params.items():
        assert (linked.params[name] == value).all()


def test_other_links_out_of_the_snapshot_are_refused_with_what_to_do(
    snapshot: Path, tmp_path: Path
) -> None:
    data = snapshot.with_name("model.onnx_data")
    outside = tmp_path / "outside"
    data.resolve().rename(outside)
    data.unlink()
    data.symlink_to(outside)
    with pytest.raises(InvalidModelError, match=r"link that leaves the model's .*put a copy of"):
        import_onnx(snapshot, context=48)


def test_blobs_beside_what_is_no_snapshot_are_not_followed(tmp_path: Path, snapshot: Path) -> None:
    os.rename(tmp_path / "hub" / "snapshots", tmp_path / "hub" / "others")
    moved = tmp_path / "hub" / "others" / "abc" / "onnx" / "model.onnx"
    with pytest.raises(InvalidModelError, match="leaves the model's folder"):
        import_onnx(moved, context=48)


def test_onnxruntime_reads_what_the_links_lead_to(snapshot: Path, tmp_path: Path) -> None:
    model = onnx.load(snapshot, load_external_data=False)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(follow_links(model, snapshot))
    )
    sessions = [
        onnxruntime.InferenceSession(given, options)
        for given in (model.SerializeToString(), str(tmp_path / "whole.onnx"))
    ]
    feeds = {
        port.name: np.ones([2 if isinstance(d, str) else d for d in port.shape], np.int64)
        for port in sessions[0].get_inputs()
    }
    linked, whole = (session.run(None, feeds)[0] for session in sessions)
    assert (linked == whole).all()


def test_a_report_is_written_of_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    write_report(snapshot, tmp_path / "report.onnx")
    assert import_onnx(tmp_path / "report.onnx", context=48).vocab_size > 0
