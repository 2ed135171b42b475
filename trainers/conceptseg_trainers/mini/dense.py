"""Dense targets of image tokens: which nouns describe what a token shows, and the box of its object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from conceptseg_hf.losses import dice_loss

from ..from_scratch.masks import bounding_box, token_coverage
from ..from_scratch.sam_stage import focal_loss
from .nouns import PHOTO_NOUNS
from .scenes import Region
from .tokenizers import SHAPE_WORDS

MARKED = "marked"
"""Channel of objects whose boxes are drawn in red."""

NOUNS = tuple(dict.fromkeys([*PHOTO_NOUNS, *SHAPE_WORDS]))
CHANNELS = {noun: i for i, noun in enumerate((*NOUNS, MARKED))}

_MAX_NOUNS = 8  # nouns per image
_MIN_COVERAGE = (
    0.12  # smallest fraction of an image token that an object must cover to be the target of the token
)


@dataclass(frozen=True)
class DenseTarget:
    """Dense targets of one image with N image tokens.

    Attributes:
        channels: Channels that are known.
        coverage: (channels, N) fraction of each token that the nouns' objects cover.
        boxes: (N, 4) box of the object of each token in fractions of the side; 0 without an object.
    """

    channels: tuple[int, ...]
    coverage: np.ndarray
    boxes: np.ndarray


def dense_target(regions: Sequence[Region], absent: Sequence[str], size: int, grid: int) -> DenseTarget:
    """Return the dense targets of an image.

    Args:
        regions: The regions of the image; those without nouns are objects as well.
        absent: Nouns that describe nothing in the image.
        size: Side length of the image.
        grid: Number of image tokens per side.
    """
    maps = {noun: np.zeros(grid * grid, dtype=np.float32) for noun in absent}
    covered = [np.full(grid * grid, _MIN_COVERAGE)]
    boxes: list[np.ndarray] = [np.zeros(4, dtype=np.float32)]
    for region in regions:
        coverage = token_coverage(region.mask, grid).astype(np.float32)
        covered.append(coverage)
        boxes.append(np.asarray(bounding_box(region.mask), dtype=np.float32) / size)
        for noun in region.nouns[:_MAX_NOUNS]:
            if noun in CHANNELS:
                maps[noun] = np.minimum(1, maps.get(noun, 0) + coverage)
    owner = np.stack(covered).argmax(0)
    channels = tuple(CHANNELS[noun] for noun in maps)
    coverage_maps = np.stack(list(maps.values())) if maps else np.zeros((0, grid * grid), np.float32)
    return DenseTarget(channels, coverage_maps, np.stack(boxes)[owner])


class DenseHeads(nn.Module):
    """Heads that predict the nouns and the box of each image token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nouns = nn.Linear(width, len(CHANNELS))
        self.box = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))


def dense_loss(heads: DenseHeads, targets: Sequence[DenseTarget], features: Tensor) -> Tensor:
    """Compute dice + focal of the known noun maps, and the L1 distance of the boxes at tokens with an object.

    Args:
        heads: The heads.
        targets: The targets of N images.
        features: (N * grid * grid, D) their image tokens.
    """
    device = features.device
    features = features.unflatten(0, (len(targets), -1))
    rows = [row for row, target in enumerate(targets) for _ in target.channels]
    channels = [channel for target in targets for channel in target.channels]
    soft_masks = torch.from_numpy(np.concatenate([target.coverage for target in targets])).to(device)
    logits = heads.nouns(features).float()[rows, :, channels]
    present = soft_masks.amax(1) > _MIN_COVERAGE
    loss = 10 * focal_loss(logits, soft_masks).mean()
    if present.any():
        loss = loss + dice_loss(logits[present], soft_masks[present])
    boxes = torch.from_numpy(np.stack([target.boxes for target in targets])).to(device)
    has_box = boxes[..., 2] > boxes[..., 0]
    if has_box.any():
        loss = loss + 5.0 * (heads.box(features[has_box]).float() - boxes[has_box]).abs().mean()
    return loss
