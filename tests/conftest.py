"""What holds for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slmtvm.without_torch import import_no_torch
from tests.shared_folder import shared_folder

# TVM takes torch along wherever that is installed, four seconds in each process of tests, of which
# one test needs it.
import_no_torch()
import tvm_ffi  # noqa: E402, F401

sys.meta_path.pop(0)

# By this jsonschema tells whether a text is an IRI, which no test asks; to import it takes seconds.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]


SLOW_AS_A_WHOLE = "\npytestmark = pytest.mark.slow\n"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where no slow test is wanted, files of nothing else are not imported, nor what they need."""
    if "not slow" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return True if SLOW_AS_A_WHOLE in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """See tests/kept_objects.py; tests that compile nothing need not wait until TVM is imported."""
    if "slmtvm.codegen.objects" in sys.modules:
        from tests.kept_objects import keep_in

        keep_in(shared_folder(tmp_path_factory) / "objects")


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of compiling itself: nothing is taken from what other tests compiled."""
    from tests.kept_objects import compile_anew, objects

    monkeypatch.setattr(objects, "object_bytes", compile_anew)
