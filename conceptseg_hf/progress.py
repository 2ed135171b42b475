"""Progress of long work: a bar on a terminal; in pipes and logs, which cannot redraw one, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(
    total: int, unit: str, desc: str = "", initial: int = 0, **options: Any
) -> tqdm | ProgressLines:
    """What shows how far a piece of work is: `update(n)`, `set_description(text)`, `close()`, or a `with` block.

    Args:
        total: How much there is to do.
        unit: Of what, in the plural; "B" for bytes.
        desc: What is being done.
        initial: What was done before.
        **options: Of tqdm, for terminals.
    """
    if not is_terminal():
        return ProgressLines(total, unit, desc, initial)
    if unit == "B":
        options |= {"unit": "B", "unit_scale": True}
    return tqdm(total=total, desc=desc or None, initial=initial, **{"unit": f" {unit}", **options})


def is_terminal() -> bool:
    """Whether standard error, where progress is shown, is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressLines:
    """Progress in whole lines, at most one in `every` seconds; work that takes less says nothing.

    Args:
        total: How much there is to do.
        unit: Of what, in the plural; "B" for bytes.
        desc: What is being done.
        initial: What was done before; the rate leaves it out.
        every: Seconds between two lines.
        file: Where to; standard error by default.
        clock: Seconds that only grow.

    Attributes:
        n: What is done.
        initial: What of it was done before.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        desc: str = "",
        initial: int = 0,
        every: float = SECONDS_BETWEEN_LINES,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.desc = total, unit, desc
        self.n = self.initial = initial
        self._number: Callable[[float], str] = tqdm.format_sizeof if unit == "B" else "{:.4g}".format
        self._every, self._file, self._clock = every, file, clock
        self._start = self._last = clock()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Counts what is done."""
        self.n += count
        now = self._clock()
        if now - self._last >= self._every:
            self._last = now
            print_line(self._line(now), self._file)

    def set_description(self, text: str) -> None:
        """Says what is being done."""
        self.desc = text

    def set_postfix(self, numbers: dict[str, Any], **_: Any) -> None:
        """For bars alone."""

    def refresh(self) -> None:
        """For bars alone."""

    def close(self) -> None:
        """The last line of work that had lines at all."""
        if self._last > self._start:
            print_line(self._line(self._clock()), self._file)

    def _line(self, now: float) -> str:
        seconds = now - self._start
        rate = (self.n - self.initial) / seconds if seconds > 0 else 0.0
        left = f", {tqdm.format_interval((self.total - self.n) / rate)} left" if rate else ""
        what = f"{self.desc}: " if self.desc else ""
        fraction = f" ({self.n / self.total:.0%})" if self.total else ""
        done, total = (self._number(value) if self.unit == "B" else value for value in (self.n, self.total))
        return f"{what}{done} of {total} {self.unit}{fraction}, {self._number(rate)} a second{left}"


def print_line(text: str, file: TextIO | None = None) -> None:
    """Writes a line to standard error, past a bar that may be drawn there."""
    tqdm.write(text, file=sys.stderr if file is None else file)


def hide_bars_in_pipes() -> None:
    """Turns the bars of Transformers and of the hub off where standard error is no terminal."""
    if not is_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
