"""What bench found fastest is kept for this machine and this very bundle, outside of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slmtvm.bundle.read import Bundle
from slmtvm.errors import SlmError
from slmtvm.host import cpu_name
from slmtvm.runtime import fastest
from slmtvm.runtime.fastest import Fastest, file_of, read_fastest, write_fastest


@pytest.fixture
def bundle(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Bundle.open(decoder)


def test_what_was_found_is_read_again(bundle: Bundle, tmp_path: Path) -> None:
    assert read_fastest(bundle) is None
    (name,) = bundle.targets
    for why in ("slow", "slower"):
        assert write_fastest(bundle, Fastest(name, why)).is_relative_to(tmp_path)
        assert read_fastest(bundle) == Fastest(name, why)
    assert len(list((tmp_path / "slmtvm" / "fastest").iterdir())) == 1


def test_it_is_of_this_bundle_and_this_machine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = replace(bundle.manifest.weights, sha256="0" * 64)
    other = replace(bundle, manifest=replace(bundle.manifest, weights=weights))
    here = file_of(bundle)
    assert here != file_of(other)
    monkeypatch.setattr(fastest, "cpu_name", lambda: cpu_name() + "+")
    assert here != file_of(bundle)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"library": "x"}', '{"library": "none-here", "why": ""}', "[" * 9999],
)
def test_what_is_damaged_is_as_if_it_were_not_there(bundle: Bundle, content: str) -> None:
    write_fastest(bundle, Fastest(bundle.targets[0], "")).write_text(content)
    assert read_fastest(bundle) is None


def test_where_it_cannot_be_written_the_error_says_what_to_do(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "slmtvm").write_text("a file")
    with pytest.raises(SlmError, match="set XDG_CACHE_HOME to a folder"):
        write_fastest(bundle, Fastest(bundle.targets[0], ""))
    assert read_fastest(bundle) is None
