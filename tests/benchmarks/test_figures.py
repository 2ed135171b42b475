"""benchmarks/figures.py, with the checkpoint "nano" in place of one for photographs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "figures.py"
pytestmark = pytest.mark.slow


def test_the_overview_has_a_row_of_photographs_if_there_is_a_checkpoint_for_them(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("figures", SCRIPT)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    photos = figures.first_photos()
    assert [sample.sample_id for sample in photos] == ["astronaut", "largest-coin", "another-coin"]

    figures.main([str(tmp_path), "--photos-model", "nano"])
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png", "mosaic.png", "routes.png"}
    drawings = figures.HEIGHT + 100  # with titles and captions
    assert Image.open(tmp_path / "overview.png").height > drawings + figures.HEIGHT
    assert capsys.readouterr().out == ""
