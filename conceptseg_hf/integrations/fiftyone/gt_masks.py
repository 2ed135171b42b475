"""True masks and heatmaps of a dataset as the evaluation sees them: one foreground, and probabilities."""

from __future__ import annotations

from typing import Any

import fiftyone as fo
import numpy as np

from ...images import load_mask, open_mask
from .labels import mask_of

_VOID = 255  # what does not count beside the class that is asked for, as PASCAL VOC has it


def classes_of(samples: Any, gt_field: str) -> dict[int, str]:
    """The classes that the dataset's `mask_targets` name for the true masks, by pixel value, without background."""
    targets = samples._dataset.mask_targets.get(gt_field) or {}
    return {value: name for value, name in targets.items() if isinstance(value, int) and value != 0}


def check_class(samples: Any, gt_field: str, gt_class: int | None) -> None:
    """Finds out whether one class has to be chosen.

    Raises:
        ValueError: If the dataset names several for the true masks, and `gt_class` is None.
    """
    classes = classes_of(samples, gt_field)
    if gt_class is None and len(classes) > 1:
        named = ", ".join(f"{value} {name!r}" for value, name in sorted(classes.items()))
        raise ValueError(
            f"field {gt_field!r} has several classes ({named}); give the value of one as gt_class."
        )


def load_gt_mask(label: fo.Segmentation, gt_class: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Foreground, and the void pixels beside a class, or None.

    Raises:
        ValueError: If the mask cannot be read, or holds several classes and `gt_class` is None.
    """
    mask = mask_of(label)
    if not isinstance(mask, np.ndarray):
        mask = open_mask(mask)
    foreground, values = load_mask(mask), np.asarray(mask)
    if values.dtype.kind not in "ui":  # yes and no, or probabilities
        return foreground, None
    values = _grey(values)
    if gt_class is None:
        _check_one_class(values)
        return foreground, None
    void = (values == _VOID) & (gt_class != _VOID)
    return values == gt_class, void if void.any() else None


def load_probabilities(heatmap: fo.Heatmap, mask: np.ndarray) -> np.ndarray:
    """The map within 0 to 1, on the mask's side of 0.5 everywhere (8 bits on disk round)."""
    values = np.asarray(heatmap.get_map())
    if values.shape != mask.shape:
        raise ValueError(
            f"heatmap has shape {values.shape}, its mask {mask.shape}; give one of the mask's shape."
        )
    low, high = heatmap.range or (0, _top_of(values.dtype))
    values = (values.astype(np.float64) - low) / ((high - low) or 1)
    return np.where(mask, np.clip(values, np.nextafter(0.5, 1), 1), np.clip(values, 0, 0.5))


def _grey(values: np.ndarray) -> np.ndarray:
    """One value a pixel: channels must not differ."""
    if values.ndim == 2:
        return values
    if values.shape[-1] >= 3 and (values[..., 1:3] != values[..., :1]).any():
        raise ValueError(
            "mask tells classes by colors; make it one of class indices "
            "(fiftyone.utils.labels.transform_segmentations) and give one of them as gt_class."
        )
    return values[..., 0]


def _check_one_class(values: np.ndarray) -> None:
    """Tells class indices, which are small or few (one and a border of 255), from the soft edges of one foreground."""
    found = np.unique(values)
    found = found[found != 0]
    if len(found) >= 2 and (found[-1] <= 64 or (len(found) <= 8 and found[0] <= 25)):
        shown = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise ValueError(
            f"mask holds several classes (pixel values {shown}); make it one of the concept alone or, to evaluate, "
            "give the value of one as gt_class."
        )


def _top_of(dtype: np.dtype) -> int:
    """The highest value of a map without a range, as FiftyOne draws it."""
    if dtype.kind in "bf":
        return 1
    return 65535 if dtype == np.uint16 else 255
