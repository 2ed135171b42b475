"""Compositing of cut-out objects into a photograph."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ...boxes import Box, box_iou, mask_to_box
from .cutouts import Cutout, Rng

_MAX_TRIES = 60


@dataclass(frozen=True)
class Placement:
    """An object and where it is pasted.

    Attributes:
        cutout: The object.
        x: Left edge in pixels of the scene.
        y: Top edge.
        extent: Longer side of the object in pixels.
        mirrored: Whether it is mirrored horizontally.
        match: How much its colors are matched to the surroundings, from 0 to 1.
    """

    cutout: Cutout
    x: int
    y: int
    extent: int
    mirrored: bool = False
    match: float = 0.35

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the scene."""
        width, height = self.cutout.pixels.size
        scale = self.extent / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    @property
    def box(self) -> Box:
        """(x1, y1, x2, y2) in pixels of the scene."""
        return self.x, self.y, self.x + self.size[0], self.y + self.size[1]


@dataclass(frozen=True)
class PhotoScene:
    """A composed scene.

    Attributes:
        image: RGB.
        masks: (H, W) bool for each object: its visible pixels.
        placements: The objects; later ones occlude earlier ones.
    """

    image: Image.Image
    masks: tuple[np.ndarray, ...]
    placements: tuple[Placement, ...]

    def box(self, index: int) -> Box | None:
        """Return the box of the visible pixels of an object."""
        return mask_to_box(self.masks[index])


def place(
    rng: Rng,
    cutouts: list[Cutout],
    size: int,
    extents: tuple[float, float] = (0.2, 0.38),
    match: float = 0.35,
) -> list[Placement] | None:
    """Place objects at random positions where their boxes do not overlap; None if there is no room.

    Args:
        rng: Random generator.
        cutouts: The objects.
        size: Side length of the scene.
        extents: Range of the longer side of an object, as a fraction of the scene.
        match: See `Placement`.
    """
    placements: list[Placement] = []
    for cutout in cutouts:
        for _ in range(_MAX_TRIES):
            extent = int(size * rng.uniform(*extents))
            candidate = Placement(cutout, 0, 0, extent, bool(rng.random() < 0.5), match)
            width, height = candidate.size
            x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
            candidate = replace(candidate, x=x, y=y)
            if all(box_iou(candidate.box, other.box) == 0 for other in placements):
                placements.append(candidate)
                break
        else:
            return None
    return placements


def compose(background: Image.Image, placements: list[Placement]) -> PhotoScene:
    """Paste objects into a background, in order."""
    pixels = np.asarray(background, dtype=np.float32)
    masks: list[np.ndarray] = []
    for placement in placements:
        pixels, mask = _paste(pixels, placement)
        masks = [earlier & ~mask for earlier in masks] + [mask]
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return PhotoScene(image, tuple(masks), tuple(placements))


def _paste(pixels: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    cutout = placement.cutout.pixels.resize(placement.size, Image.Resampling.BICUBIC)
    if placement.mirrored:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rgba = np.asarray(cutout, dtype=np.float32)
    color, alpha = rgba[..., :3], rgba[..., 3:] / 255
    x1, y1, x2, y2 = map(int, placement.box)
    region = pixels[y1:y2, x1:x2]
    color = _match_colors(color, alpha[..., 0] > 0.5, region, placement.match)
    result = pixels.copy()
    result[y1:y2, x1:x2] = region + (color - region) * alpha
    mask = np.zeros(pixels.shape[:2], dtype=bool)
    mask[y1:y2, x1:x2] = alpha[..., 0] > 0.5
    return result, mask


def _match_colors(color: np.ndarray, inside: np.ndarray, region: np.ndarray, amount: float) -> np.ndarray:
    """Move mean and standard deviation of each channel toward those of the surroundings."""
    if amount <= 0 or not inside.any():
        return color
    own, around = color[inside], region.reshape(-1, 3)
    mean, deviation = own.mean(axis=0), own.std(axis=0) + 1e-3
    target_mean = mean + amount * (around.mean(axis=0) - mean)
    target_deviation = deviation + amount * (around.std(axis=0) - deviation)
    return (color - mean) * (target_deviation / deviation) + target_mean
