"""Fixtures of the tests of CoPRS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from random_coprs import build_random_coprs

from conceptseg_hf import CoPRSForSegmentation


@pytest.fixture(scope="session", params=["sam", "sam3_tracker"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_coprs() -> Callable[..., CoPRSForSegmentation]:
    """Return `build_random_coprs`."""
    return build_random_coprs


@pytest.fixture(scope="session")
def coprs(make_coprs, kind) -> CoPRSForSegmentation:
    return make_coprs(kind)


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    def make(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)

    return make
