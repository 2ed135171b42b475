"""Scenes: drawn objects, and the words that describe each of them.

A `Scene` is an image with its ground truth. Families (`families/`) combine scenes into tasks; training code can query
the mask of any phrase that describes objects of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...boxes import Box, mask_to_box
from .rendering import (
    COLORS,
    GREY,
    SHAPES,
    TEXTURES,
    BoolArray,
    FloatArray,
    draw_background,
    draw_shape,
    smooth_noise,
    texture_color,
    to_uint8,
    turns_of,
)

# Every eighth pair of color and shape is drawn only in the split "test-compositional".
HELD_OUT_PAIRS = frozenset(
    (color, shape) for i, color in enumerate(COLORS) for j, shape in enumerate(SHAPES) if (3 * i + j) % 8 == 5
)


@dataclass(frozen=True)
class Look:
    """The attributes of an object; a `kind` ("shadow", "scratch") replaces the other attributes in its name."""

    shape: str
    color: str = GREY
    texture: str = "plain"
    kind: str = ""

    @property
    def phrase(self) -> str:
        """Noun phrase of 1 to 3 words for an object of this look."""
        if self.kind in ("hidden", "glass", "core"):
            return {"core": f"{self.color} core"}.get(self.kind, f"{self.kind} {self.shape}")
        if self.kind:
            return self.kind
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{texture}{self.color} {self.shape}"

    def matches(self, words: Sequence[str]) -> bool:
        """Whether every word describes this look; "object" describes every look with a shape and a color."""
        if self.kind:
            own = {self.kind, *self.phrase.split(), *(("transparent",) if self.kind == "glass" else ())}
        else:
            own = {self.shape, self.color, self.texture, "object"}
        return all(word in own for word in words)


@dataclass(frozen=True)
class SceneObject:
    """An object: look, center and radius in pixels, rotation in steps of 15 degrees, visible pixels (S, S)."""

    look: Look
    cx: float
    cy: float
    radius: float
    turn: int = 0
    mask: BoolArray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool), repr=False)

    @property
    def box(self) -> Box | None:
        """(x1, y1, x2, y2) of the mask, x2 and y2 exclusive; None if no pixel is visible."""
        return mask_to_box(self.mask)


@dataclass(frozen=True)
class Scene:
    """An image (S, S, 3) and the objects in it."""

    pixels: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    def mask_of(self, words: Sequence[str]) -> BoolArray:
        """Return the union of the masks of all objects that the words describe, (S, S)."""
        mask = np.zeros(self.pixels.shape[:2], dtype=bool)
        for item in self.objects:
            if item.look.matches(words):
                mask |= item.mask
        return mask


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """Draw one item uniformly."""
    return items[int(rng.integers(len(items)))]


def random_look(rng: np.random.Generator, held_out: bool = False, **fixed: str) -> Look:
    """Draw a random look; half of all looks are plain.

    Args:
        rng: Random generator.
        held_out: Whether the pair of color and shape must be held out from training; if False, it must not be.
        **fixed: Attributes that are given.

    Raises:
        ValueError: If the fixed attributes leave no permitted pair.
    """
    pairs = [
        (color, shape)
        for color in ([fixed["color"]] if "color" in fixed else COLORS)
        for shape in ([fixed["shape"]] if "shape" in fixed else SHAPES)
        if ((color, shape) in HELD_OUT_PAIRS) == held_out
    ]
    if not pairs:
        raise ValueError(
            f"random_look: no permitted pair of color and shape has {fixed}; fix at most one of the two."
        )
    color, shape = pairs[int(rng.integers(len(pairs)))]
    texture = fixed.get("texture") or (pick(rng, TEXTURES[1:]) if rng.random() < 0.5 else "plain")
    return Look(shape, color, texture)


def place(
    rng: np.random.Generator, size: int, radii: Sequence[float], taken: Sequence[SceneObject] = ()
) -> list[tuple[float, float]]:
    """Draw centers of circles with the given radii, inside the image and as far apart as 24 tries allow."""
    centers: list[tuple[float, float]] = []
    others = [(item.cx, item.cy, item.radius) for item in taken]
    for radius in radii:
        best, best_gap = (size / 2, size / 2), -1e9
        for _ in range(24):
            low, span = radius * 0.95 + 1, max(1.0, size - 2 * (radius * 0.95 + 1))
            cx, cy = low + span * rng.random(), low + span * rng.random()
            gap = min(
                (math.sqrt((cx - x) ** 2 + (cy - y) ** 2) - 0.95 * (radius + r) for x, y, r in others),
                default=1.0,
            )
            if gap > best_gap:
                best, best_gap = (cx, cy), gap
            if gap >= 0:
                break
        centers.append(best)
        others.append((*best, radius))
    return centers


def random_radius(rng: np.random.Generator, size: int, low: float = 0.09, high: float = 0.18) -> float:
    """Draw a radius between two fractions of the image's side length."""
    return size * (low + (high - low) * float(rng.random()))


def make_objects(
    rng: np.random.Generator, size: int, looks: Sequence[Look], low: float = 0.09, high: float = 0.18
) -> list[SceneObject]:
    """Create objects of the given looks with random positions and sizes, not yet drawn; smaller in crowded scenes."""
    if len(looks) > 4:
        high = max(low, high - 0.02 * (len(looks) - 4))
    radii = [random_radius(rng, size, low, high) for _ in looks]
    # The largest are placed first: they are the hardest to fit.
    order = sorted(range(len(looks)), key=lambda i: -radii[i])
    centers = dict(zip(order, place(rng, size, [radii[i] for i in order]), strict=True))
    turns = [turns_of(look.shape) for look in looks]
    return [
        SceneObject(look, *centers[i], radii[i], turns[i][int(rng.integers(len(turns[i])))])
        for i, look in enumerate(looks)
    ]


def color_value(rng: np.random.Generator, color: str) -> FloatArray:
    """Draw an RGB value near that of a color word; "grey" gives any gray."""
    if color == GREY:
        return np.full(3, int(rng.integers(60, 200)), dtype=np.float32) + rng.integers(-6, 7, 3).astype(
            np.float32
        )
    return np.asarray(COLORS[color], dtype=np.float32) + rng.integers(-14, 15, 3).astype(np.float32)


def draw_object(
    rng: np.random.Generator, image: FloatArray, item: SceneObject, earlier: list[SceneObject]
) -> SceneObject:
    """Draw an object and return it with its mask; its pixels are removed from the masks of the objects below it."""
    size = image.shape[0]
    patch = draw_shape(size, item.look.shape, item.cx, item.cy, item.radius, item.turn)
    mask = patch.mask(size)
    kind = item.look.kind
    if kind == "glass":
        h, w = patch.coverage.shape
        under = image[patch.y : patch.y + h, patch.x : patch.x + w]
        shifted = np.roll(under, (h // 4, w // 4), axis=(0, 1))
        patch.paste(image, shifted + np.float32(14), 0.9)
        rim = np.clip(np.float32(1.0) - np.abs(patch.coverage - np.float32(0.5)) * np.float32(2.0), 0, 1)
        image[patch.y : patch.y + h, patch.x : patch.x + w] += rim[:, :, None] * np.float32(46)
    elif kind == "shadow":
        image *= np.float32(1.0) - soften(patch.mask(size).astype(np.float32), max(1, size // 64))[
            :, :, None
        ] * np.float32(0.55)
    elif kind == "hidden":
        # The object is filled with its background, shifted and mirrored, so that only its border is visible.
        h, w = patch.coverage.shape
        under = image[patch.y : patch.y + h, patch.x : patch.x + w]
        twin = np.roll(under[::-1, ::-1], (h // 3, w // 3), axis=(0, 1))
        patch.paste(image, twin + np.float32(int(rng.integers(10, 17)) * (1 if rng.random() < 0.5 else -1)))
    else:
        period = max(4.0, item.radius * 0.5)
        patch.paste(image, texture_color(patch, item.look.texture, color_value(rng, item.look.color), period))
    for i, other in enumerate(earlier):
        if (other.mask & mask).any():
            earlier[i] = replace(other, mask=other.mask & ~mask)
    return replace(item, mask=mask)


def draw_scene(
    rng: np.random.Generator, size: int, objects: Sequence[SceneObject], background: FloatArray | None = None
) -> Scene:
    """Draw objects, in order, on a background (a random one by default)."""
    image = draw_background(rng, size) if background is None else background.copy()
    drawn: list[SceneObject] = []
    for item in objects:
        drawn.append(draw_object(rng, image, item, drawn))
    return Scene(to_uint8(image), tuple(drawn))


def soften(mask: FloatArray, radius: int) -> FloatArray:
    """Blur (S, S) with a box filter of the given radius, twice per axis; edges are repeated."""
    result = mask
    for axis in (0, 1, 0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (radius, radius)
        padded = np.pad(result, padding, mode="edge")
        length = result.shape[axis]
        total = np.zeros_like(result)
        for shift in range(2 * radius + 1):
            total += padded[shift : shift + length] if axis == 0 else padded[:, shift : shift + length]
        result = total / np.float32(2 * radius + 1)
    return result


def draw_product(rng: np.random.Generator, size: int) -> FloatArray:
    """Draw a regular industrial surface, (S, S, 3): brushed metal, tiles, a perforated plate or woven mesh."""
    level = np.float32(rng.integers(110, 180))
    tone = level + rng.integers(-10, 11, 3).astype(np.float32)
    axis = np.arange(size)
    period = max(4, int(rng.integers(8, 15)) * size // 128)
    shade = smooth_noise(rng, size, 2, 8)
    kind = int(rng.integers(4))
    if kind == 0:
        shade += rng.integers(-9, 10, size).astype(np.float32)[:, None]
    elif kind == 1:
        lines = (axis % period == 0).astype(np.float32)
        shade -= np.maximum(lines[:, None], lines[None, :]) * np.float32(40)
    elif kind == 2:
        offset = (axis % period) - period // 2
        shade -= np.where(
            offset[:, None] ** 2 + offset[None, :] ** 2 < (period * 0.3) ** 2, np.float32(45), np.float32(0)
        )
    else:
        weave = (axis[:, None] // (period // 2) + axis[None, :] // (period // 2)) % 2
        shade += np.where(weave == 0, np.float32(14), np.float32(-14))
    return tone[None, None, :] + shade[:, :, None]


def draw_tissue(rng: np.random.Generator, size: int) -> FloatArray:
    """Draw speckled tissue of low contrast, (S, S, 3), pinkish or gray."""
    tones = ((176, 120, 112), (150, 150, 150), (120, 96, 92), (190, 160, 140))
    tone = np.asarray(tones[int(rng.integers(len(tones)))], dtype=np.float32)
    shade = (
        smooth_noise(rng, size, 4, 20)
        + smooth_noise(rng, size, 9, 12)
        + rng.integers(-10, 11, (size, size)).astype(np.float32)
    )
    return tone[None, None, :] + shade[:, :, None]


def blob_coverage(rng: np.random.Generator, size: int, cx: float, cy: float, radius: float) -> FloatArray:
    """Draw an irregular round region, (S, S) between 0 and 1: a circle distorted by smooth noise."""
    x = np.arange(size, dtype=np.float32) - np.float32(cx)
    y = np.arange(size, dtype=np.float32) - np.float32(cy)
    stretch = np.float32(0.75 + 0.5 * rng.random())
    distance = np.sqrt((x * x)[None, :] * stretch + (y * y)[:, None] / stretch)
    wobble = smooth_noise(rng, size, 6, 100) / np.float32(100) * np.float32(0.3 * radius)
    return np.clip(np.float32(0.5) - (distance + wobble - np.float32(radius)), 0, 1)


def stroke_coverage(size: int, x0: float, y0: float, x1: float, y1: float, width: float) -> FloatArray:
    """Draw a straight scratch from one point to another, (S, S) between 0 and 1."""
    dx, dy = x1 - x0, y1 - y0
    length2 = max(dx * dx + dy * dy, 1e-3)
    x = np.arange(size, dtype=np.float32)[None, :] - np.float32(x0)
    y = np.arange(size, dtype=np.float32)[:, None] - np.float32(y0)
    along = np.clip((x * np.float32(dx) + y * np.float32(dy)) / np.float32(length2), 0, 1)
    ox, oy = x - along * np.float32(dx), y - along * np.float32(dy)
    return np.clip(np.float32(0.5) - (np.sqrt(ox * ox + oy * oy) - np.float32(width / 2)), 0, 1)
