"""Which function lowers an op."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from slmtvm.passes.lower_kernels.emitter import Handler

HANDLERS: dict[str, Handler] = {}


def handles(name: str) -> Callable[[Handler], Handler]:
    """Decorator: the function below lowers the op ``name``."""

    def register(handler: Handler) -> Handler:
        HANDLERS[name] = handler
        return handler

    return register


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The shape of a value, all of it known."""
    return tuple(int(d) for d in expr.ty.shape.values)
