"""Every kind of kernel that has knobs: how it is made, which settings there are.

Knobs change how fast a kernel is and nothing else: every setting computes the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from slmtvm.schedules import attention, experts, linear
from slmtvm.schedules.isa import Isa
from slmtvm.schedules.kernel import Kernel
from slmtvm.schedules.linear.knobs import Knobs, KnobSpace


class KnobChoice(Protocol):
    """Chooses the knobs of a kernel of ``kind`` and ``shape``."""

    def __call__(self, kind: str, shape: Any, isa: Isa) -> Knobs: ...


@dataclass(frozen=True)
class Template:
    """One kind: ``shape_type`` is the dataclass of its shapes.

    ``effective`` is a setting that gives the same code with the values that are really used (more
    rows than there are count as all rows).
    """

    shape_type: type
    build: Callable[[Any, Isa, Knobs], Kernel]
    default_knobs: Callable[[Any, Isa], Knobs]
    knob_space: Callable[[Any, Isa], KnobSpace]
    effective: Callable[[Any, Isa, Knobs], Knobs]

    def settings(self, shape: Any, isa: Isa) -> list[Knobs]:
        """All settings of different code, the default first."""
        space = self.knob_space(shape, isa)
        found = {}
        for values in itertools.product(*space.values()):
            knobs = self.effective(shape, isa, dict(zip(space, values, strict=True)))
            found[tuple(sorted(knobs.items()))] = knobs
        default = self.effective(shape, isa, self.default_knobs(shape, isa))
        found.pop(tuple(sorted(default.items())), None)
        return [default, *found.values()]


TEMPLATES = {
    "linear": Template(
        linear.LinearShape,
        linear.build,
        linear.default_knobs,
        linear.knob_space,
        linear.effective_knobs,
    ),
    "routed_linear": Template(
        experts.RoutedShape,
        experts.build_linear,
        experts.default_knobs,
        experts.knob_space,
        experts.effective_knobs,
    ),
    **{
        kind: Template(
            attention.AttentionShape,
            partial(attention.build_tuned, kind),
            attention.default_knobs,
            attention.knob_space,
            attention.effective_knobs,
        )
        for kind in ("attend", "decode")
    },
}


def default_choice(kind: str, shape: Any, isa: Isa) -> Knobs:
    """The knobs of a kernel that nothing was measured of."""
    return TEMPLATES[kind].default_knobs(shape, isa)
