"""Tests of writing image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def gray_image(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 6), value, dtype=np.uint8))


def test_a_file_is_written_once(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone.files import write_image

    first = write_image(gray_image(1), tmp_path / "masks", "a")
    written = Path(first).stat().st_mtime_ns
    assert write_image(gray_image(1), tmp_path / "masks", "a") == first
    assert Path(first).stat().st_mtime_ns == written
    assert write_image(gray_image(2), tmp_path / "masks", "a") != first


def test_an_edited_file_is_kept_and_not_reused(fo, tmp_path):
    from conceptseg_hf.integrations.fiftyone.files import write_image

    first = write_image(gray_image(1), tmp_path, "a")
    gray_image(9).save(first)
    second = write_image(gray_image(1), tmp_path, "a")
    assert second != first == write_image(gray_image(1), tmp_path, "b").replace("b-", "a-")
    assert np.asarray(Image.open(first)).max() == 9 and np.asarray(Image.open(second)).max() == 1
    assert write_image(gray_image(1), tmp_path, "a") == second
    Path(second).write_bytes(b"half")
    third = write_image(gray_image(1), tmp_path, "a")
    assert third not in (first, second) and np.asarray(Image.open(third)).max() == 1
    assert len(list(tmp_path.iterdir())) == 4  # no temporary files


@pytest.mark.parametrize("name", ["/tmp/x", "../../x", "..", "a/../../../x", "..\\x"])
def test_names_cannot_escape_the_folder(fo, name):
    from conceptseg_hf.integrations.fiftyone.files import default_folder

    base = Path(fo.config.default_dataset_dir, "conceptseg")
    for folder in (default_folder(name, "field"), default_folder("data", name)):
        assert folder.resolve().relative_to(base.resolve()).parts == folder.relative_to(base).parts
        assert len(folder.relative_to(base).parts) == 2


@pytest.mark.parametrize("name", ["plain-test", "2026.01.02", "my data (3)", "..x", "Größe"])
def test_ordinary_names_are_kept(fo, name):
    from conceptseg_hf.integrations.fiftyone.files import default_folder

    assert default_folder(name, "field").parts[-2:] == (name, "field")
