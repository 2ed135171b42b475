"""The progress of an evaluation: samples a second, and the time that is left."""

from __future__ import annotations

from ...progress import progress_bar

# The rate is always in samples a second, not in seconds a sample where it is slow.
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Progress:
    """A bar (see `progress_bar`), or nothing.

    Args:
        total: Number of samples.
        shown: Whether there is a bar.
    """

    def __init__(self, total: int, shown: bool) -> None:
        # Without smoothing the rate is that of the whole run: routes take turns, and they are not alike.
        self._bar = progress_bar(total, "samples", smoothing=0, bar_format=_FORMAT) if shown else None

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, text: str) -> None:
        """Says what is being done, in front of the bar."""
        if self._bar is not None:
            self._bar.set_description(text)

    def skip(self, count: int) -> None:
        """Counts samples that were found on disk; the rate leaves them out."""
        if self._bar is not None:
            self._bar.initial += count
            self._bar.n += count
            self._bar.refresh()

    def advance(self, count: int) -> None:
        """Counts samples that are done."""
        if self._bar is not None:
            self._bar.update(count)
