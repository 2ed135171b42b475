"""Dense targets: what each place of a picture shows. Heads that predict them teach vision towers to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from conceptseg_hf.boxes import mask_to_box
from conceptseg_hf.data.concept_shapes.rendering import COLORS, GREY, SHAPES, TEXTURES
from conceptseg_hf.data.concept_shapes.scenes import Look, Scene
from conceptseg_hf.presets import NANO_IMAGE_SIZE as SIDE

GRID = 8  # image tokens per side
KINDS = ("", "glass", "shadow", "hidden", "core", "scratch", "stain", "hole", "lesion")
DENSE_CLASSES = {
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 2,
    "texture": len(TEXTURES) + 1,
    "kind": len(KINDS) + 1,
    "marked": 3,
}
"""Classes that a place can show, by attribute; class 0 is "nothing"."""

_MIN_AREA = 0.12  # fraction of an image token that an object must cover to be what the token shows


@dataclass(frozen=True)
class Visible:
    """One object in a picture: its look, its visible pixels (SIDE, SIDE), and whether a red box marks it."""

    look: Look
    mask: np.ndarray
    marked: bool = False


def visible_objects(scene: Scene) -> list[Visible]:
    """The objects of a scene, as its picture shows them."""
    return [Visible(item.look, item.mask) for item in scene.objects]


def dense_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of what each place shows; places that show an object count as much as all together.

    Args:
        logits: (N, sum of `DENSE_CLASSES`).
        classes: (N, 5), as `dense_targets` gives them.
    """
    loss = logits.new_zeros(())
    is_object = classes[:, 0] > 0
    for i, part in enumerate(logits.split(list(DENSE_CLASSES.values()), dim=1)):
        each = nn.functional.cross_entropy(part, classes[:, i], reduction="none")
        loss = loss + 0.25 * each.mean() + each[is_object].sum() / is_object.sum().clamp(min=1)
    return loss


def shape_accuracy(logits: Tensor, classes: Tensor) -> float:
    """Fraction of the places showing an object whose shape is right; arguments as in `dense_class_loss`."""
    is_object = classes[:, 0] > 0
    shapes = logits[is_object, : DENSE_CLASSES["shape"]].argmax(1)
    return float((shapes == classes[is_object, 0]).float().mean())


def _token_areas(mask: np.ndarray) -> np.ndarray:
    """Fraction of each image token that a mask covers, (GRID * GRID,)."""
    side = SIDE // GRID
    return mask.reshape(GRID, side, GRID, side).mean(axis=(1, 3)).reshape(-1)


def tokens_of(mask: np.ndarray) -> np.ndarray:
    """The image tokens that show a mask: covered by a quarter, or by half as much as the best covered one."""
    areas = _token_areas(mask)
    return areas >= min(0.25, 0.5 * areas.max())


def token_objects(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Which of some objects, given by masks (SIDE, SIDE), each image token shows most of; -1 where it shows none."""
    areas = np.stack([np.full(GRID * GRID, _MIN_AREA), *(_token_areas(mask) for mask in masks)])
    return areas.argmax(0) - 1


def dense_targets(objects: Sequence[Visible]) -> tuple[np.ndarray, np.ndarray]:
    """What each image token shows: classes (GRID * GRID, 5), 0 for nothing, and its box in 0..1."""
    shown = token_objects([item.mask for item in objects])
    nothing = ((0,) * len(DENSE_CLASSES), (0.0,) * 4)
    table = [
        (look_classes(item.look, item.marked), np.asarray(mask_to_box(item.mask)) / SIDE)
        if item.mask.any()
        else nothing
        for item in objects
    ]
    classes, boxes = zip(*table, nothing)
    return np.asarray(classes, dtype=np.int64)[shown], np.asarray(boxes, dtype=np.float32)[shown]


def look_classes(look: Look, marked: bool = False) -> tuple[int, int, int, int, int]:
    """Class indices of a look, in the order of `DENSE_CLASSES`."""
    return (
        SHAPES.index(look.shape) + 1,
        (*COLORS, GREY).index(look.color) + 1,
        TEXTURES.index(look.texture) + 1,
        KINDS.index(look.kind) + 1,
        1 + marked,
    )


def class_map(scene: Scene) -> np.ndarray:
    """What each pixel shows, (S, S, 5) class indices of `DENSE_CLASSES`, 0 for nothing."""
    classes = np.zeros((*scene.pixels.shape[:2], len(DENSE_CLASSES)), dtype=np.int64)
    for item in scene.objects:
        classes[item.mask] = look_classes(item.look)
    return classes
