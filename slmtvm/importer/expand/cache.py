"""Caches of a fixed size, into which a step writes what it adds."""

from __future__ import annotations

from collections.abc import Sequence

from slmtvm.importer.expand.registry import expansion
from slmtvm.importer.expand.site import Site


@expansion("TensorScatter", 24)
def tensor_scatter(site: Site) -> Sequence[str]:
    """Inputs: the cache, what is written into it, and the place of each sequence's.

    A cache without a past holds what is written at its beginning; what lies behind that is counted
    as nothing by an Attention that takes the number of valid keys.
    """
    if site.attrs.get("mode", b"linear") not in (b"linear", "linear"):
        raise site.refuse("a cache that begins again at its end")
    places = site.values(2)
    if not site.known(site.input(0)) or places is None or places.any():
        raise site.refuse("a cache that is written anywhere but at its beginning")
    return [site.op("Identity", site.input(1))]
