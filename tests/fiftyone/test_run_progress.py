"""Tests of `Progress` and `time_left`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture()
def clock(fo, monkeypatch):
    """Replace the clock by a constant and return it."""
    from conceptseg_hf.integrations.fiftyone import progress

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    return 1000.0


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 60, 5, ""),
        (60, 60, 5, ""),
        (59, 60, 0.1, "about 1 s left"),
        (10, 60, 10, "about 50 s left"),
        (10, 60, 36, "about 3 min left"),
        (1, 61, 130, "about 2 h 10 min left"),
    ],
)
def test_time_left(clock, done, total, seconds, text):
    from conceptseg_hf.integrations.fiftyone.progress import time_left

    assert time_left(done, total, clock - seconds) == text


def test_progress_as_a_string(clock):
    from conceptseg_hf.integrations.fiftyone import Progress

    bad = {f"/a/folder/{name}.png": "it is empty" for name in "abcd"}
    progress = Progress(60, 10, 3, {"id": "damaged"}, bad, started=clock - 10)
    assert str(progress) == (
        "10 of 60 segmented, 3 skipped, 1 with an error, about 50 s left; "
        "4 references cannot be used ('a.png', 'b.png', 'c.png', ...)"
    )
    part = Progress(20, 5, cancelled=True)
    assert str(progress.plus(part)).startswith("15 of 60 segmented, 3 skipped, 1 with an error, cancelled; ")
    assert str(Progress(4, 4)) == "4 of 4 segmented" and Progress(0).fraction == 1
