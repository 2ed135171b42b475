"""How coprs-nano is trained: number of steps and schedule."""

from __future__ import annotations

from ..from_scratch.command import scaled
from ..from_scratch.loop import Schedule

STEPS = 2500
_HELD_OUT = 120


def held_out_count(scale: float) -> int:
    """Return the number of held-out samples per evaluation of a training whose number of steps is scaled."""
    return scaled(_HELD_OUT, min(1.0, scale), 12)


def schedule_of(steps: int) -> Schedule:
    """Return the schedule of a training of this length."""
    return Schedule(
        steps, learning_rate=1e-3, warmup=200, decay=0.5, evaluate_every=500, save_every=25, ema=0.998
    )
