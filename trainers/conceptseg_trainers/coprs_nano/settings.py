"""How coprs-nano is trained: number of steps and schedule."""

from __future__ import annotations

from ..from_scratch.loop import Schedule

STEPS = 2500
HELD_OUT = 120
"""Number of held-out samples per evaluation during training."""


def schedule_of(steps: int) -> Schedule:
    """Return the schedule of a training of this length."""
    return Schedule(
        steps, learning_rate=1e-3, warmup=200, decay=0.5, evaluate_every=500, save_every=25, ema=0.998
    )
