"""Einsum as transpositions, sums, elementwise and matrix products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slmtvm.importer.expand.registry import expansion
from slmtvm.importer.expand.site import Site

_ELLIPSIS = "..."
_HIDDEN = "0123456789"  # labels of the axes that an ellipsis stands for


@dataclass(frozen=True)
class _Term:
    """A value and the label of each of its axes."""

    value: str
    labels: str


@expansion("Einsum", 12)
def einsum(site: Site) -> Sequence[str]:
    """Terms are multiplied one after the other, each label summed as soon as no other has it."""
    terms, result = _parse(site)
    current = terms[0]
    for place, term in enumerate(terms[1:], 1):
        later = "".join(t.labels for t in terms[place + 1 :]) + result
        current = _product(site, current, term, later)
    current = _summed(site, current, "".join(label for label in current.labels if label in result))
    return [_ordered(site, current, result)]


def _parse(site: Site) -> tuple[list[_Term], str]:
    """The terms, and the labels of the result."""
    equation = site.attrs["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    parts = left.split(",")
    if len(parts) != len(site.node.inputs):
        raise site.invalid(
            f"{equation!r} has {len(parts)} terms for {len(site.node.inputs)} inputs"
        )
    most = max(
        _hidden(site, part, name) for part, name in zip(parts, site.node.inputs, strict=True)
    )
    terms = []
    for part, name in zip(parts, site.node.inputs, strict=True):
        labels = part.replace(_ELLIPSIS, _HIDDEN[most - _hidden(site, part, name) : most])
        if not re.fullmatch(r"[A-Za-z0-9]*", labels) or len(labels) != site.rank(name):
            raise site.invalid(f"{part!r} of {equation!r} does not fit {list(site.shape(name))}")
        if len(set(labels)) != len(labels):
            raise site.refuse(f"the diagonal {part!r} of {equation!r}")
        terms.append(_Term(name, labels))
    if arrow:
        result = right.replace(_ELLIPSIS, _HIDDEN[:most])
    else:
        counts = "".join(term.labels for term in terms)
        named = sorted(c for c in set(counts) if counts.count(c) == 1 and c not in _HIDDEN)
        result = _HIDDEN[:most] + "".join(named)
    sizes: dict[str, int] = {}
    for term in terms:
        for label, size in zip(term.labels, site.shape(term.value), strict=True):
            if sizes.setdefault(label, size) != size:
                raise site.refuse(f"an axis of {equation!r} that is {sizes[label]} and {size} long")
    known = {label for term in terms for label in term.labels}
    if not known.issuperset(result) or len(set(result)) != len(result):
        raise site.invalid(f"the result of {equation!r} has labels that no term has, or one twice")
    return terms, result


def _hidden(site: Site, part: str, name: str) -> int:
    """How many axes the ellipsis of a term stands for."""
    return site.rank(name) - len(part.replace(_ELLIPSIS, "")) if _ELLIPSIS in part else 0


def _product(site: Site, left: _Term, right: _Term, later: str) -> _Term:
    """Both terms' product, without the labels that nothing ``later`` has."""
    if site.known(left.value) and not site.known(right.value):
        left, right = right, left  # weights come second
    left = _summed(site, left, "".join(c for c in left.labels if c in right.labels + later))
    right = _summed(site, right, "".join(c for c in right.labels if c in left.labels + later))
    shared = [c for c in left.labels if c in right.labels]
    contracted = "".join(c for c in shared if c not in later)
    batch = "".join(c for c in shared if c in later)
    rows = "".join(c for c in left.labels if c not in shared)
    columns = "".join(c for c in right.labels if c not in shared)
    if not contracted:
        labels = batch + rows + columns
        wide = [_aligned(site, term, labels) for term in (left, right)]
        return _Term(site.op("Mul", *wide), labels)
    sizes = {c: (term, axis) for term in (right, left) for axis, c in enumerate(term.labels)}
    # Without a batch, any leading axes of the left side are rows.
    groups = [*rows] if rows and not batch else [*batch, rows]
    a = _ordered(site, left, batch + rows + contracted)
    b = _ordered(site, right, batch + contracted + columns)
    a = _merged(site, a, sizes, (*groups, contracted))
    b = _merged(site, b, sizes, (*batch, contracted, columns))
    product = site.op("MatMul", a, b)
    if any(len(group) != 1 for group in (*groups, columns)):
        product = _reshaped(site, product, sizes, (*batch, *rows, *columns))
    return _Term(product, batch + rows + columns)


def _summed(site: Site, term: _Term, kept: str) -> _Term:
    """The sum over the axes that are not ``kept``."""
    axes = [axis for axis, label in enumerate(term.labels) if label not in kept]
    if not axes:
        return term
    value = site.op("ReduceSum", term.value, site.ints(*axes), keepdims=0)
    return replace(term, value=value, labels="".join(c for c in term.labels if c in kept))


def _ordered(site: Site, term: _Term, labels: str) -> str:
    """The term's value with its axes in this order."""
    perm = tuple(term.labels.index(label) for label in labels)
    in_order = perm == tuple(range(len(perm)))
    return term.value if in_order else str(site.op("Transpose", term.value, perm=perm))


def _aligned(site: Site, term: _Term, labels: str) -> str:
    """The term's value with an axis for each of ``labels``, of 1 where it has none."""
    value = _ordered(site, term, "".join(c for c in labels if c in term.labels))
    missing = [axis for axis, label in enumerate(labels) if label not in term.labels]
    return str(site.op("Unsqueeze", value, site.ints(*missing))) if missing else value


def _merged(
    site: Site, value: str, sizes: dict[str, tuple[_Term, int]], axes: Sequence[str]
) -> str:
    """``value`` with an axis for each group of labels, of 1 for an empty one."""
    if all(len(group) == 1 for group in axes):
        return value
    return _reshaped(site, value, sizes, axes)


def _reshaped(
    site: Site, value: str, sizes: dict[str, tuple[_Term, int]], axes: Sequence[str]
) -> str:
    if not axes:
        return str(site.op("Reshape", value, site.constant(np.zeros(0), np.int64)))
    parts = []
    for group in axes:
        size = site.ints(1)
        for label in group:
            term, axis = sizes[label]
            one = site.size(term.value, axis)
            size = one if group[0] == label else site.op("Mul", size, one)
        parts.append(size)
    return str(site.op("Reshape", value, site.op("Concat", *parts, axis=0)))
