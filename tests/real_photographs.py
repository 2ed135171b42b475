"""The folder of real photographs, and the mark of tests that need it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("CONCEPTSEG_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "photos"))

needs_real_photographs = pytest.mark.skipif(
    not REAL.is_dir(), reason="the photographs are not here; set CONCEPTSEG_PHOTOS to their folder"
)
