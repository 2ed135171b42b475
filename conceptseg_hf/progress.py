"""Progress of long tasks: a bar on a terminal, and periodic lines in pipes and logs, which cannot redraw a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO, TypeAlias

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0

ProgressFunction: TypeAlias = Callable[[int, int, str], None]
"""Function of the number of completed units, their total number and their name in the plural."""


def progress_bar(
    total: int, unit: str, desc: str = "", initial: int = 0, **options: Any
) -> tqdm | ProgressLines:
    """Return a progress bar with `update(n)`, `set_description(text)` and `close()`, usable as a context manager.

    Args:
        total: Number of units in total.
        unit: Name of the units in the plural; "B" for bytes.
        desc: Description of the task.
        initial: Number of units completed before.
        **options: Options of tqdm, used on terminals only.
    """
    if not is_terminal():
        return ProgressLines(total, unit, desc, initial)
    if unit == "B":
        options |= {"unit": "B", "unit_scale": True}
    return tqdm(total=total, desc=desc or None, initial=initial, **{"unit": f" {unit}", **options})


def is_terminal() -> bool:
    """Whether standard error, to which progress is written, is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class ProgressLines:
    """Progress in whole lines, at most one every `every` seconds; shorter tasks print nothing.

    Args:
        total: Number of units in total.
        unit: Name of the units in the plural; "B" for bytes.
        desc: Description of the task.
        initial: Number of units completed before, which the rate does not count.
        every: Minimum number of seconds between two lines.
        file: Output stream; standard error by default.
        clock: Monotonic clock in seconds.

    Attributes:
        n: Number of completed units.
        initial: Number of units completed before.
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
        """Advance the count of completed units."""
        self.n += count
        now = self._clock()
        if now - self._last >= self._every:
            self._last = now
            print_line(self._line(now), self._file)

    def set_description(self, text: str) -> None:
        """Set the description of the task."""
        self.desc = text

    def set_postfix(self, numbers: dict[str, Any], **_: Any) -> None:
        """Do nothing; part of the interface of tqdm."""

    def refresh(self) -> None:
        """Do nothing; part of the interface of tqdm."""

    def close(self) -> None:
        """Print a final line if any line has been printed before."""
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


class ProgressCalls:
    """Progress that calls a function, for interfaces other than a terminal.

    Args:
        total: Number of units in total.
        unit: Name of the units in the plural.
        report: Function that is called with the number of completed units, `total` and `unit`.
    """

    def __init__(self, total: int, unit: str, report: ProgressFunction) -> None:
        self.total, self.unit, self.n = total, unit, 0
        self._report = report
        report(0, total, unit)

    def update(self, count: int = 1) -> None:
        """Advance the count of completed units."""
        self.n += count
        self._report(self.n, self.total, self.unit)

    def close(self) -> None:
        """Do nothing; part of the interface of tqdm."""


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line to standard error without breaking an active progress bar."""
    tqdm.write(text, file=sys.stderr if file is None else file)


def hide_bars_in_pipes() -> None:
    """Disable the progress bars of Transformers and the Hub if standard error is not a terminal."""
    if not is_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
