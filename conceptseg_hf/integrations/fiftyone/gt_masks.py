"""Read ground-truth masks as a binary foreground, and heatmaps as probabilities."""

from __future__ import annotations

from typing import Any

import fiftyone as fo
import numpy as np

from ...images import load_mask, open_mask
from .labels import mask_of

_VOID = 255  # label of ignored pixels, as in PASCAL VOC


def classes_of(samples: Any, gt_field: str) -> dict[int, str]:
    """Return the classes of the ground-truth masks in `mask_targets` by pixel value, without the background."""
    targets = samples._dataset.mask_targets.get(gt_field) or {}
    return {value: name for value, name in targets.items() if isinstance(value, int) and value != 0}


def check_class(samples: Any, gt_field: str, gt_class: int | None) -> None:
    """Check that `gt_class` is given if the ground-truth masks have several classes.

    Raises:
        ValueError: If `mask_targets` names several classes for the ground-truth masks and `gt_class` is None.
    """
    classes = classes_of(samples, gt_field)
    if gt_class is None and len(classes) > 1:
        named = ", ".join(f"{value} {name!r}" for value, name in sorted(classes.items()))
        raise ValueError(
            f"field {gt_field!r} has several classes ({named}); pass the value of one as gt_class."
        )


def load_gt_mask(label: fo.Segmentation, gt_class: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the foreground (H, W) bool, and the ignored pixels (H, W) bool or None.

    Raises:
        ValueError: If the mask cannot be read, or contains several classes and `gt_class` is None.
    """
    mask = mask_of(label)
    if not isinstance(mask, np.ndarray):
        mask = open_mask(mask)
    foreground, values = load_mask(mask), np.asarray(mask)
    if values.dtype.kind not in "ui":  # boolean mask, or probabilities
        return foreground, None
    values = _single_channel(values)
    if gt_class is None:
        _check_one_class(values)
        return foreground, None
    void = (values == _VOID) & (gt_class != _VOID)
    return values == gt_class, void if void.any() else None


def load_probabilities(heatmap: fo.Heatmap, mask: np.ndarray) -> np.ndarray:
    """Scale a heatmap to [0, 1].

    Values are clipped to the mask's side of 0.5, because 8-bit files round probabilities.

    Raises:
        ValueError: If the heatmap and the mask have different shapes.
    """
    values = np.asarray(heatmap.get_map())
    if values.shape != mask.shape:
        raise ValueError(
            f"heatmap has shape {values.shape}, but its mask has {mask.shape}; use a heatmap of the mask's shape."
        )
    low, high = heatmap.range or (0, _default_maximum(values.dtype))
    values = (values.astype(np.float64) - low) / ((high - low) or 1)
    return np.where(mask, np.clip(values, np.nextafter(0.5, 1), 1), np.clip(values, 0, 0.5))


def _single_channel(values: np.ndarray) -> np.ndarray:
    """Return one value per pixel; the color channels must be equal."""
    if values.ndim == 2:
        return values
    if values.shape[-1] >= 3 and (values[..., 1:3] != values[..., :1]).any():
        raise ValueError(
            "mask encodes classes as colors; convert it to class indices "
            "(fiftyone.utils.labels.transform_segmentations) and pass one of them as gt_class."
        )
    return values[..., 0]


def _check_one_class(values: np.ndarray) -> None:
    """Raise if the mask contains class indices rather than a single foreground with soft edges.

    Class indices are small (at most 64) or few (at most 8 values including a low one, such as a class and its border
    255).

    Raises:
        ValueError: If the mask contains several classes.
    """
    values = np.unique(values)
    values = values[values != 0]
    if len(values) >= 2 and (values[-1] <= 64 or (len(values) <= 8 and values[0] <= 25)):
        shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        raise ValueError(
            f"mask contains several classes (pixel values {shown}); use a mask of the concept only or, for evaluation, "
            "pass the value of one class as gt_class."
        )


def _default_maximum(dtype: np.dtype) -> int:
    """Return the maximum value that FiftyOne assumes for a heatmap without a range."""
    if dtype.kind in "bf":
        return 1
    return 65535 if dtype == np.uint16 else 255
