"""benchmarks/figures.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "figures.py"
pytestmark = pytest.mark.slow


def test_the_overview_has_a_row_of_drawings_and_one_of_photographs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("figures", SCRIPT)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    photos = figures.salient_photos()
    assert [sample.sample_id for sample in photos] == ["salient-astronaut", "salient-rocket", "salient-cell"]

    figures.main([str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png", "mosaic.png", "routes.png"}
    drawings = figures.HEIGHT + 100  # with titles and captions
    overview = Image.open(tmp_path / "overview.png")
    assert overview.height > drawings + figures.HEIGHT and overview.mode == "RGB"  # a palette changes colors
    assert capsys.readouterr().out == ""
