"""Which function lowers an op."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from slmtvm.passes.lower_kernels.emitter import Handler

HANDLERS: dict[str, Handler] = {}
BY_SESSION: set[str] = set()
"""The ops that depend on a session: on what it holds, or on its position."""


def handles(name: str, *, by_session: bool = False) -> Callable[[Handler], Handler]:
    """Decorator: the function below lowers the op ``name``, which is ``by_session`` or not."""

    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        if by_session:
            BY_SESSION.add(name)
        return handler

    return register


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The shape of a value, all of it known."""
    return tuple(int(d) for d in expr.ty.shape.values)
