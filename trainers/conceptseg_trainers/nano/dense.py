"""Dense targets: the object that each image token or pixel shows. Auxiliary heads that predict them train the encoders.

An image is divided into GRID x GRID image tokens, the resolution of the VLM and of SAM 3's fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Look, Scene
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

from ..from_scratch.masks import bounding_box, token_coverage

GRID = 8  # image tokens per side
KINDS = ("", "glass", "shadow", "hidden", "core", "scratch", "stain", "hole", "lesion")
DENSE_CLASSES = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 2,
    "texture": len(TEXTURES) + 1,
    "kind": len(KINDS) + 1,
    "marked": 3,
}
"""Number of classes by attribute; class 0 is the background."""

_MIN_AREA = (
    0.12  # smallest fraction of an image token that an object must cover to be the target of the token
)


@dataclass(frozen=True)
class VisibleObject:
    """An object in an image: its look, its visible pixels (SIDE, SIDE), and whether its box is drawn in red."""

    look: Look
    mask: np.ndarray
    marked: bool = False


def visible_objects(scene: Scene) -> list[VisibleObject]:
    """Return the objects of a scene."""
    return [VisibleObject(item.look, item.mask) for item in scene.objects]


def dense_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Compute the cross-entropy of dense predictions: a quarter of the mean, plus the mean over the objects' positions.

    Args:
        logits: (N, sum of `DENSE_CLASSES`) logits.
        classes: (N, 5) class indices from `dense_targets` or `class_map`.
    """
    loss = logits.new_zeros(())
    is_object = classes[:, 0] > 0
    for i, attribute_logits in enumerate(logits.split(list(DENSE_CLASSES.values()), dim=1)):
        losses = nn.functional.cross_entropy(attribute_logits, classes[:, i], reduction="none")
        loss = loss + 0.25 * losses.mean() + losses[is_object].sum() / is_object.sum().clamp(min=1)
    return loss


def shape_accuracy(logits: Tensor, classes: Tensor) -> float:
    """Compute the accuracy of the shape over the positions of objects; see `dense_class_loss` for the arguments."""
    is_object = classes[:, 0] > 0
    shapes = logits[is_object, : DENSE_CLASSES["shape"]].argmax(1)
    return float((shapes == classes[is_object, 0]).float().mean())


def token_objects(masks: Sequence[np.ndarray], grid: int = GRID) -> np.ndarray:
    """Return the index of the object that covers most of each image token, (grid * grid,); -1 for the background.

    Args:
        masks: Square masks of the objects.
        grid: Number of image tokens per side.
    """
    coverage = np.stack([np.full(grid * grid, _MIN_AREA), *(token_coverage(mask, grid) for mask in masks)])
    return coverage.argmax(0) - 1


def dense_targets(objects: Sequence[VisibleObject]) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes (GRID * GRID, 5) and the box, in fractions of the side, of the object of each image token.

    Both are 0 for the background.
    """
    object_indices = token_objects([item.mask for item in objects])
    background = ((0,) * len(DENSE_CLASSES), (0.0,) * 4)
    table = [
        (look_classes(item.look, item.marked), np.asarray(bounding_box(item.mask)) / SIDE)
        if item.mask.any()
        else background
        for item in objects
    ]
    classes, boxes = zip(*table, background)  # index -1 is the background
    return (
        np.asarray(classes, dtype=np.int64)[object_indices],
        np.asarray(boxes, dtype=np.float32)[object_indices],
    )


def look_classes(look: Look, marked: bool = False) -> tuple[int, int, int, int, int]:
    """Return the class indices of a look, in the order of `DENSE_CLASSES`."""
    return (
        SHAPES.index(look.shape) + 1,
        (*COLORS, GREY).index(look.color) + 1,
        TEXTURES.index(look.texture) + 1,
        KINDS.index(look.kind) + 1,
        1 + marked,
    )


def class_map(scene: Scene) -> np.ndarray:
    """Return the class indices of each pixel, (S, S, 5) in the order of `DENSE_CLASSES`, 0 for the background."""
    classes = np.zeros((*scene.pixels.shape[:2], len(DENSE_CLASSES)), dtype=np.int64)
    for item in scene.objects:
        classes[item.mask] = look_classes(item.look)
    return classes
