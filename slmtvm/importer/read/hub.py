"""The cache of a model hub: the files of a model are links into a folder of blobs.

It holds snapshots/REVISION/..., in which every file is a link to one of blobs/, named by its hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import GraphProto, ModelProto, TensorProto

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def hub_blobs(folder: Path) -> Path | None:
    """Where the links of ``folder`` lead if it lies in such a cache: the only place they may."""
    for above in folder.absolute().parents:
        blobs = above.parent / _BLOBS
        if above.name == _SNAPSHOTS and blobs.is_dir():
            return blobs.resolve()
    return None


def follow_links(model: ModelProto, path: Path) -> Path:
    """The folder of the external data of ``model``, which is the file ``path`` without that data.

    In a hub's cache ``model`` is changed to name the blobs: onnx and onnxruntime follow no links.
    """
    blobs = hub_blobs(path.parent)
    entries = [
        entry
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    targets = {e.value: (path.parent / e.value).resolve() for e in entries}
    if blobs is None or not targets or any(t.parent != blobs for t in targets.values()):
        return path.parent
    for entry in entries:
        entry.value = targets[entry.value].name
    return blobs


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            yield from _tensors(attribute.g)
