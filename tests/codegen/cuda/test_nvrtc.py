"""NVRTC, which runs in this process, leaves it as it was."""

from __future__ import annotations

import locale

import pytest

from slmtvm.codegen.cuda.nvrtc import RELEASES, compile_cubin, is_installed

ARCHITECTURES = {11: "sm_72", 12: "sm_87", 13: "sm_110"}


@pytest.mark.parametrize("release", RELEASES)
def test_texts_are_read_as_before(release: int) -> None:
    if not is_installed(release):
        pytest.skip(f"no NVRTC {release} here: pip install 'slmtvm[{RELEASES[release][1]}]'")
    before = locale.nl_langinfo(locale.CODESET)
    text = 'extern "C" __global__ void one(int *a) { a[0] = 1; }'
    assert compile_cubin(text, ARCHITECTURES[release], release)
    assert locale.nl_langinfo(locale.CODESET) == before
