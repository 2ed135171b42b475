"""The progress of an evaluation: samples per second and remaining time."""

from __future__ import annotations

from ...progress import progress_bar

# The rate is always in samples per second, never in seconds per sample.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress:
    """A progress bar (see `progress_bar`), or nothing if it is not shown.

    Args:
        total: Number of samples.
        shown: Whether to show a bar.
    """

    def __init__(self, total: int, shown: bool) -> None:
        # Without smoothing, the rate is the mean of the whole run; the routes alternate and differ in speed.
        self._bar = progress_bar(total, "samples", smoothing=0, bar_format=_FORMAT) if shown else None

    @property
    def shown(self) -> bool:
        """Whether a bar is shown."""
        return self._bar is not None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, text: str) -> None:
        """Set the description in front of the bar."""
        if self._bar is not None:
            self._bar.set_description(text)

    def skip(self, count: int) -> None:
        """Count samples that were found on disk; they are excluded from the rate."""
        if self._bar is not None:
            self._bar.initial += count
            self._bar.n += count
            self._bar.refresh()

    def advance(self, count: int) -> None:
        """Count samples that are done."""
        if self._bar is not None:
            self._bar.update(count)
