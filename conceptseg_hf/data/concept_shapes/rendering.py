"""Drawing of backgrounds, shapes and textures as NumPy arrays.

All operations are elementary float32 or integer arithmetic in a fixed order, without BLAS or transcendental functions,
so that a seed gives the same image on every machine. Lengths are in pixels unless stated otherwise; x grows to the
right, y downwards; pixel centers are integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "green": (44, 168, 62),
    "blue": (44, 78, 220),
    "yellow": (240, 222, 50),
    "orange": (250, 140, 30),
    "purple": (136, 52, 186),
    "cyan": (60, 208, 220),
    "pink": (248, 146, 196),
}
GREY = "grey"
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "bar")
TEXTURES = ("plain", "striped", "dotted", "checked")

_ANGLE_STEP = 15
# Rounded so that the last bit of a platform's cosine cannot change a pixel.
_COSINES = tuple(float(np.round(np.cos(np.deg2rad(_ANGLE_STEP * i)), 6)) for i in range(24))
_SINES = tuple(float(np.round(np.sin(np.deg2rad(_ANGLE_STEP * i)), 6)) for i in range(24))
_STAR_NORMALS = tuple(
    (float(np.round(np.sin(2 * np.pi * i / 5), 6)), float(np.round(np.cos(2 * np.pi * i / 5), 6)))
    for i in range(5)
)


def _circle(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.sqrt(u * u + v * v) - np.float32(0.9)


def _square(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.78)


def _triangle(u: FloatArray, v: FloatArray) -> FloatArray:
    sides = np.abs(u) * np.float32(0.894) - v * np.float32(0.447) - np.float32(0.402)
    return np.maximum(sides, v - np.float32(0.7))


def _diamond(u: FloatArray, v: FloatArray) -> FloatArray:
    return (np.abs(u) * np.float32(1.5) + np.abs(v) - np.float32(1.0)) * np.float32(0.555)


def _star(u: FloatArray, v: FloatArray) -> FloatArray:
    # Inside at least four of five half-planes: the second largest distance decides.
    distances = np.stack([u * np.float32(x) - v * np.float32(y) for x, y in _STAR_NORMALS])
    return np.partition(distances, 3, axis=0)[3] - np.float32(0.36)


def _cross(u: FloatArray, v: FloatArray) -> FloatArray:
    a, b = np.abs(u), np.abs(v)
    arm, width = np.float32(0.95), np.float32(0.32)
    return np.minimum(np.maximum(a - arm, b - width), np.maximum(a - width, b - arm))


def _ring(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.7)) - np.float32(0.25)


def _bar(u: FloatArray, v: FloatArray) -> FloatArray:
    return np.maximum(np.abs(u) - np.float32(1.0), np.abs(v) - np.float32(0.34))


_DISTANCES: dict[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "bar": _bar,
}
# Allowed rotations in steps of 15 degrees. A square rotated by 45 degrees would look like a diamond, for instance, so
# each shape is rotated only as far as its name remains correct.
_TURNS: dict[str, tuple[int, ...]] = {
    "circle": (0,),
    "square": (0, 1, 23),
    "triangle": (0, 1, 23, 12, 11),
    "diamond": (0, 1, 23, 6),
    "star": (0, 1, 23, 2),
    "cross": (0, 1, 23),
    "ring": (0,),
    "bar": (0, 3, 6, 9),
}


@dataclass(frozen=True)
class Patch:
    """A drawn region of an image: top-left corner, coverage (h, w) between 0 and 1, and coordinates in the shape."""

    x: int
    y: int
    coverage: FloatArray
    u: FloatArray
    v: FloatArray

    def paste(self, image: FloatArray, color: FloatArray, opacity: float = 1.0) -> None:
        """Blend a color, (3,) or (h, w, 3), into the image, (S, S, 3), in place."""
        h, w = self.coverage.shape
        region = image[self.y : self.y + h, self.x : self.x + w]
        alpha = (self.coverage * np.float32(opacity))[:, :, None]
        region += (color - region) * alpha

    def mask(self, size: int) -> BoolArray:
        """Return a mask of the pixels that are more than half covered, (size, size)."""
        mask = np.zeros((size, size), dtype=bool)
        h, w = self.coverage.shape
        mask[self.y : self.y + h, self.x : self.x + w] = self.coverage > 0.5
        return mask


def turns_of(shape: str) -> tuple[int, ...]:
    """Return the allowed rotations of a shape, in steps of 15 degrees."""
    return _TURNS[shape]


def draw_shape(size: int, shape: str, cx: float, cy: float, radius: float, turn: int = 0) -> Patch:
    """Draw the coverage of a shape centered at (cx, cy) on a (size, size) image, anti-aliased over one pixel."""
    reach = radius * 1.1 + 1.0
    x0, x1 = max(0, int(cx - reach)), min(size, int(cx + reach) + 2)
    y0, y1 = max(0, int(cy - reach)), min(size, int(cy + reach) + 2)
    x = (np.arange(x0, x1, dtype=np.float32) - np.float32(cx)) / np.float32(radius)
    y = (np.arange(y0, y1, dtype=np.float32) - np.float32(cy)) / np.float32(radius)
    cosine, sine = np.float32(_COSINES[turn]), np.float32(_SINES[turn])
    u = x[None, :] * cosine + (y * sine)[:, None]
    v = (y * cosine)[:, None] - x[None, :] * sine
    coverage = np.clip(np.float32(0.5) - _DISTANCES[shape](u, v) * np.float32(radius), 0, 1)
    return Patch(x0, y0, coverage, u * np.float32(radius), v * np.float32(radius))


def texture_color(patch: Patch, texture: str, color: FloatArray, period: float) -> FloatArray:
    """Return the colors of a textured object: (3,) if plain, else (h, w, 3) with the color and a darker tone."""
    if texture == "plain":
        return color
    u, v = np.floor(patch.u / np.float32(period / 2)), np.floor(patch.v / np.float32(period / 2))
    if texture == "striped":
        dark = u % 2 == 0
    elif texture == "checked":
        dark = (u + v) % 2 == 0
    else:
        du = patch.u - np.float32(period) * np.floor(patch.u / np.float32(period) + np.float32(0.5))
        dv = patch.v - np.float32(period) * np.floor(patch.v / np.float32(period) + np.float32(0.5))
        dark = du * du + dv * dv < np.float32((0.33 * period) ** 2)
    return np.where(dark[:, :, None], color * np.float32(0.28), color)


def smooth_noise(rng: np.random.Generator, size: int, cells: int, amplitude: int) -> FloatArray:
    """Interpolate random values on a coarse grid to (size, size), in integers so that results are reproducible."""
    grid = rng.integers(-amplitude, amplitude + 1, (cells + 1, cells + 1))
    position = np.arange(size) * cells * 64 // size
    index, weight = position // 64, position % 64
    rows = grid[index] * (64 - weight)[:, None] + grid[index + 1] * weight[:, None]
    full = rows[:, index] * (64 - weight) + rows[:, index + 1] * weight
    return full.astype(np.float32) / np.float32(4096)


def draw_background(rng: np.random.Generator, size: int) -> FloatArray:
    """Draw a muted background, (size, size, 3): one of six patterns over smooth noise, in a dull tone."""
    level = int(rng.integers(70, 190))
    tone = level + rng.integers(-14, 15, 3).astype(np.float32)
    shade = smooth_noise(rng, size, int(rng.integers(2, 7)), 18)
    kind, period = int(rng.integers(6)), int(rng.integers(5, 17)) * size // 128 + 1
    axis = np.arange(size)
    contrast = np.float32(rng.integers(4, 12))
    if kind == 1:
        shade += np.where(axis // period % 2 == 0, contrast, -contrast)[None, :]
    elif kind == 2:
        shade += np.where(axis // period % 2 == 0, contrast, -contrast)[:, None]
    elif kind == 3:
        shade += np.where((axis[:, None] + axis[None, :]) // period % 2 == 0, contrast, -contrast)
    elif kind == 4:
        shade += np.where((axis[:, None] // period + axis[None, :] // period) % 2 == 0, contrast, -contrast)
    elif kind == 5:
        shade += rng.integers(-12, 13, (size, size)).astype(np.float32)
    return tone[None, None, :] + shade[:, :, None]


def to_uint8(image: FloatArray) -> NDArray[np.uint8]:
    """Round and clip an image to 8 bits."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
