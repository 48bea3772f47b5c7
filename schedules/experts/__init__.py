"""Kernels of a mixture of experts: who goes where, the experts' linear layers, and their sum."""

from __future__ import annotations

from slmtvm.schedules.experts.combine import build_combine, build_rounded_combine
from slmtvm.schedules.experts.grouping import Grouping, build_group
from slmtvm.schedules.experts.linear import (
    RoutedShape,
    build_linear,
    default_knobs,
    effective_knobs,
    knob_space,
    layout,
    pack,
    packed_names,
)
from slmtvm.schedules.experts.route import RouteOp, build_route
from slmtvm.schedules.experts.rows import RoutedRowOp, build_row

__all__ = [
    "Grouping", "RouteOp", "RoutedRowOp", "RoutedShape", "build_combine", "build_group",
    "build_linear", "build_rounded_combine", "build_route", "build_row", "default_knobs",
    "effective_knobs", "knob_space", "layout", "pack", "packed_names",
]  # fmt: skip
