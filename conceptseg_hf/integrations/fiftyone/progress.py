"""Progress of a run and its remaining time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

_MAX_SHOWN_NAMES = 3  # number of reference files that a progress line lists


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        total: Number of samples to segment.
        done: Number of processed samples, including those with errors.
        skipped: Number of samples that already had a prediction.
        errors: Error message of each failed sample, by sample id.
        bad_references: Error message of each reference sample that cannot be used, by file path; complete before the
            first sample is segmented.
        cancelled: Whether the run was cancelled.
        started: Value of `time.monotonic()` at the start.
    """

    total: int
    done: int = 0
    skipped: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    bad_references: dict[str, str] = field(default_factory=dict)
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic, compare=False, repr=False)

    @property
    def fraction(self) -> float:
        """Fraction of the samples that is done, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    def plus(self, part: Progress) -> Progress:
        """Return this progress with the progress of a part of its samples added."""
        return replace(
            self,
            done=self.done + part.done,
            errors=self.errors | part.errors,
            bad_references=self.bad_references | part.bad_references,
            cancelled=part.cancelled,
        )

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} segmented"]
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{len(self.errors)} with an error"] if self.errors else []
        left = time_left(self.done, self.total, self.started)
        parts += ["cancelled"] if self.cancelled else [left] if left else []
        text = ", ".join(parts)
        if self.bad_references:
            names = [Path(path).name for path in self.bad_references]
            shown = ", ".join(map(repr, names[:_MAX_SHOWN_NAMES])) + (
                ", ..." if len(names) > _MAX_SHOWN_NAMES else ""
            )
            text += f"; {len(names)} references cannot be used ({shown})"
        return text


def time_left(done: int, total: int, started: float) -> str:
    """Estimate the remaining time from the average time per item, such as "about 2 min left".

    Args:
        done: Number of processed items.
        total: Total number of items.
        started: Value of `time.monotonic()` before the first item.

    Returns:
        The estimate, or an empty string at the start and at the end.
    """
    if not 0 < done < total:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    if seconds < 60:
        return f"about {max(1, round(seconds))} s left"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min left" if hours else f"about {minutes} min left"
