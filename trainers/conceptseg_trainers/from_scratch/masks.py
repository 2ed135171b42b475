"""Masks on the grid of image tokens, and the boxes of masks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from conceptseg_hf.boxes import mask_to_box


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box of a mask that is not empty; see `boxes.mask_to_box`."""
    box = mask_to_box(mask)
    assert box is not None
    return box


def token_coverage(mask: np.ndarray, grid: int) -> np.ndarray:
    """Return the fraction of each of grid x grid image tokens that a square mask covers, (grid * grid,)."""
    side = mask.shape[0] // grid
    return mask.reshape(grid, side, grid, side).mean(axis=(1, 3)).reshape(-1)


def mask_to_tokens(mask: np.ndarray, grid: int) -> np.ndarray:
    """Return the image tokens of a mask, (grid * grid,) bool.

    These are the tokens that the mask covers by a quarter, or by half of its largest coverage.
    """
    coverage = token_coverage(mask, grid)
    return coverage >= min(0.25, 0.5 * coverage.max())


def total(losses: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more losses."""
    return functools.reduce(operator.add, losses)
