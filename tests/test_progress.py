"""Progress bars on terminals, lines in pipes and logs; rates exclude units completed before."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm
from transformers.utils import logging

from conceptseg_hf.evaluation.running.progress import Progress
from conceptseg_hf.progress import ProgressLines, hide_bars_in_pipes, progress_bar


class Clock:
    """A clock that is advanced by the test."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture()
def clock():
    return Clock()


@pytest.fixture()
def lines(clock):
    def make(total, unit="samples", **options):
        return ProgressLines(total, unit, file=io.StringIO(), clock=clock, **options)

    return make


def test_short_tasks_print_nothing(lines, clock):
    with lines(100) as progress:
        for _ in range(100):
            clock.now += 0.25
            progress.update()
    assert progress._file.getvalue() == ""


def test_long_tasks_print_periodic_lines(lines, clock):
    with lines(200, desc="completions", initial=100) as progress:
        for _ in range(100):
            clock.now += 1.0
            progress.update()
    assert progress._file.getvalue().splitlines() == [
        "completions: 130 of 200 samples (65%), 1 a second, 01:10 left",
        "completions: 160 of 200 samples (80%), 1 a second, 00:40 left",
        "completions: 190 of 200 samples (95%), 1 a second, 00:10 left",
        "completions: 200 of 200 samples (100%), 1 a second, 00:00 left",
    ]


def test_bytes_are_printed_with_unit_prefixes(lines, clock):
    progress = lines(3 * 10**9, "B", desc="writing weights")
    clock.now += 60
    progress.update(1_500_000_000)
    assert (
        progress._file.getvalue() == "writing weights: 1.50G of 3.00G B (50%), 25.0M a second, 01:00 left\n"
    )


def test_bar_is_shown_on_terminals_only(monkeypatch, capsys):
    assert isinstance(progress_bar(3, "images"), ProgressLines)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(3, "images", "demo", initial=1) as bar:
        bar.update()
    assert isinstance(bar, tqdm)
    assert "\rdemo:  67%" in sys.stderr.getvalue() and "2/3" in sys.stderr.getvalue()


def test_evaluation_rate_excludes_existing_records(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(100, shown=True) as progress:
        progress.skip(80)
        progress._bar._time, progress._bar.start_t = clock, clock.now
        clock.now += 2.0
        progress.advance(10)
    line = sys.stderr.getvalue().rpartition("\r")[2]
    assert "90/100" in line and " 5.00 samples/s" in line
    with Progress(100, shown=False) as progress:
        progress.skip(80)
        progress.describe("x")
        progress.advance(10)


def test_library_bars_are_hidden_in_pipes(monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    with monkeypatch.context() as terminal:
        terminal.setattr(sys, "stderr", Terminal())
        hide_bars_in_pipes()
        assert logging.is_progress_bar_enabled()
    try:
        hide_bars_in_pipes()
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
