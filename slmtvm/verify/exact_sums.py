"""onnxruntime with kernels that compute what their operators mean, whatever CPU it runs on.

What small known sums show to be wrong here is computed by other kernels: weights that are not laid
out beforehand, signed weights as unsigned ones, packed weights as floats. The sums are the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from onnx import inliner

from slmtvm.verify.known_sums import (
    DISABLE_PREPACKING,
    Form,
    forms_of,
    is_right,
    remedy,
)


@dataclass(frozen=True)
class ExactSession:
    """``doubts``: which of the file's operators this onnxruntime computes wrongly all the same."""

    session: onnxruntime.InferenceSession
    doubts: tuple[str, ...] = ()


def exact_session(
    model: str | Path | onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """A session on the CPU whose sums are exact; raises what onnxruntime raises."""
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        return open_exact(copy, None, options).session
    path = Path(model)
    return open_exact(onnx.load(path, load_external_data=False), path, options).session


def open_exact(
    model: onnx.ModelProto,
    path: Path | None,
    options: onnxruntime.SessionOptions,
    *,
    folder: Path | None = None,
    changed: bool = False,
) -> ExactSession:
    """A session of ``model``, which may be changed, and what is to be said of it.

    ``path``: the file that it was read from; None where there is none. ``folder``: where its
    external data lies, the file's own if None. ``changed``: whether it is no longer what the file
    holds. Weights that are quantized while the model runs and have no zero point stay as they are.
    Raises what onnxruntime raises.
    """
    if model.functions:
        inlined = inliner.inline_local_functions(model)
        if forms_of(inlined):
            model, changed = inlined, True
    if folder is None and path is not None:
        folder = path.parent
    forms = forms_of(model)
    level = int(options.graph_optimization_level)
    prepacked = _prepacked(forms, level)
    wrong = {f for f in forms if not is_right(f, level, prepacked=prepacked, remedied=False)}
    doubts = [f for f in wrong if not is_right(f, level, prepacked=prepacked, remedied=True)]
    # Where onnxruntime itself makes integer products of a graph, those of unsigned bytes.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not prepacked:
        options.add_session_config_entry(DISABLE_PREPACKING, "1")
    if wrong:
        model, changed = remedy(model, wrong, folder), True
    given: str | bytes = model.SerializeToString() if changed or path is None else str(path)
    if folder is not None and isinstance(given, bytes):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return ExactSession(session, tuple(sorted(map(_doubt, doubts))))


def _prepacked(forms: Collection[Form], level: int) -> bool:
    """Whether weights may be laid out beforehand: False only where it helps, and harms nothing."""

    def right(prepacked: bool) -> set[Form]:
        return {f for f in forms if is_right(f, level, prepacked=prepacked, remedied=False)}

    with_layout = right(True)
    return len(with_layout) == len(forms) or not right(False) > with_layout


def _doubt(form: Form) -> str:
    return (
        f"onnxruntime {onnxruntime.__version__} computes {form} wrongly on this machine, and a "
        "difference may be its own"
    )
