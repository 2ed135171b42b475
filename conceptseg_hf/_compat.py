"""Compatibility of torchvision's pure-Python parts with a torch build that it was not compiled for.

The torchvision wheels on PyPI are CUDA builds. With a CPU build of torch, their compiled operators cannot be loaded
and importing torchvision fails, because it registers fake kernels for two operators that do not exist. Declaring the
schemas of these operators is enough, since the transforms are plain PyTorch. So is torchvision's fallback of
`roi_align`, which SAM 3's box prompts use, but it collects all sampling points in memory and is replaced here.

This file depends only on torch, because `.ci/setup` also installs it without the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from typing import Any

import torch
from torch import Tensor

_OPERATOR_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # keeps the schemas registered


def declare_operators() -> None:
    """Declare missing operators so that torchvision can be imported. Does nothing if its extension loads."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in pathlib.Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATOR_SCHEMAS:
        _library.define(schema)


def ensure_torchvision() -> None:
    """Make torchvision importable, and replace its fallback of `roi_align` if its operators are missing."""
    declare_operators()
    if importlib.util.find_spec("torchvision") is None:
        return
    if not importlib.import_module("torchvision.extension")._has_ops():
        module: Any = importlib.import_module("torchvision.ops.roi_align")
        module._roi_align = roi_align


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Compute RoIAlign (Mask R-CNN, section 3) with one matrix product per axis, since bilinear sampling is separable.

    Args:
        features: (N, C, H, W) feature maps.
        rois: (K, 5) index of the feature map, and box (x1, y1, x2, y2).
        spatial_scale: Factor from the coordinates of the boxes to those of the feature maps.
        height: Number of bins along y.
        width: Number of bins along x.
        sampling_ratio: Number of sampling points per bin and axis; if not positive, the size of the bin, rounded up.
        aligned: Whether the centers of cells, rather than their corners, have integer coordinates.

    Returns:
        (K, C, height, width) mean of the sampling points of each bin, with the dtype of the feature maps.
    """
    computed = features.float()
    boxes = rois[:, 1:].float() * spatial_scale - (0.5 if aligned else 0.0)
    sizes = boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        sizes = sizes.clamp(min=1)
    across = _sampling_weights(boxes[:, 0], sizes[:, 0], width, features.shape[3], sampling_ratio)
    down = _sampling_weights(boxes[:, 1], sizes[:, 1], height, features.shape[2], sampling_ratio)
    pooled = down[:, None] @ computed[rois[:, 0].long()] @ across[:, None].transpose(2, 3)
    return pooled.to(features.dtype)


def _sampling_weights(starts: Tensor, sizes: Tensor, bins: int, cells: int, sampling_ratio: int) -> Tensor:
    """Return the weights of the cells of one axis in the mean of each bin, (K, bins, cells)."""
    bin_sizes = sizes / bins
    counts = torch.full_like(sizes, sampling_ratio) if sampling_ratio > 0 else bin_sizes.ceil()
    divisors = counts.clamp(min=1)  # bins without an extent have no points, and the value 0
    points = torch.arange(int(divisors.max()) if len(divisors) else 1, device=sizes.device)
    offsets = (points + 0.5) / divisors[:, None]  # in bins
    positions = starts[:, None, None] + bin_sizes[:, None, None] * (
        torch.arange(bins, device=sizes.device)[:, None] + offsets[:, None]
    )
    sampled = (points < counts[:, None])[:, None] & (positions >= -1) & (positions <= cells)
    distances = positions.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=sizes.device)
    weights = (1 - distances.abs()).clamp(min=0) * sampled[..., None]
    return weights.sum(2) / divisors[:, None, None]
