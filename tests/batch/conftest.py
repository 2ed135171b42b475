"""Fixtures for the tests of batch jobs: folders of small images, and a concept of the embedded checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="batch jobs need pyarrow")

from conceptseg_hf import ConceptPrompt
from conceptseg_hf.batch import BatchJob, open_images
from conceptseg_hf.concept_prompt import concept_hash
from conceptseg_hf.loading import load_model_and_processor


def draw(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A colored square on a gray background, whose place and color depend on the seed."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size[1], size[0], 3), 128, dtype=np.uint8)
    x, y = rng.integers(0, 20, 2)
    pixels[y : y + 18, x : x + 18] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.fixture()
def make_images(tmp_path) -> Callable[..., Path]:
    """Write a folder with a number of images, of which those with the given numbers are damaged."""

    def make(count: int, damaged: tuple[int, ...] = (), name: str = "images") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            path = folder / f"{number:03d}.png"
            draw(number).save(path)
            if number in damaged:
                path.write_bytes(path.read_bytes()[:60])
        return folder

    return make


@pytest.fixture(scope="session")
def concept() -> ConceptPrompt:
    """A concept that SAM 3 of the embedded checkpoint accepts in every image."""
    model, _ = load_model_and_processor()
    fields = {"threshold": 0.0, "score": 0.9, "model_hash": concept_hash(model)}
    return ConceptPrompt("the square", ("red square", "green square"), **fields)


@pytest.fixture()
def make_job(concept) -> Callable[..., BatchJob]:
    """A job of small batches and shards."""

    def make(images, **changes) -> BatchJob:
        fields = {"concept": concept, "batch_size": 3, "batches_per_shard": 2, **changes}
        return BatchJob(open_images(images), **fields)

    return make


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
