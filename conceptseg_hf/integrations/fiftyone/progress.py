"""How far a run is, and how long it will take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

_NAMED = 3  # references that a line names


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: Samples to do.
        done: Samples done, those with errors included.
        skipped: Samples that had a prediction before.
        errors: Error of each sample that failed, by sample id.
        bad_references: What is wrong with each reference sample that cannot be used, by its file; known before the
            first sample is segmented.
        cancelled: Whether the run was cancelled; what is done stays.
        started: Time of `time.monotonic` at the start.
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
        """Share that is done, 0 to 1."""
        return self.done / self.total if self.total else 1.0

    def plus(self, part: Progress) -> Progress:
        """This progress, and a part of its samples done."""
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
            shown = ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
            text += f"; {len(names)} references cannot be used ({shown})"
        return text


def time_left(done: int, total: int, started: float) -> str:
    """The time that the rest will take at the pace so far, such as "about 2 min left".

    Args:
        done: Items done.
        total: Items to do.
        started: Time of `time.monotonic` before the first.

    Returns:
        The text, or an empty one at the start and at the end.
    """
    if not 0 < done < total:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    if seconds < 60:
        return f"about {max(1, round(seconds))} s left"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min left" if hours else f"about {minutes} min left"
