"""The segmentation loss of CoPRS (eq. 8) over the unpadded region, averaged per image and in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..losses import dice_loss, focal_loss

DICE_WEIGHT, FOCAL_WEIGHT = 3.0, 10.0  # after the first 1,500 steps (appendix B.3)


@dataclass(frozen=True)
class PriorLosses:
    """Terms of L_SEG (eq. 8), scalars.

    Attributes:
        prior: Cross-entropy of the positional prior.
        dice: Dice loss of the mask.
        focal: Focal loss of the mask.
    """

    prior: Tensor
    dice: Tensor
    focal: Tensor

    def total(self, dice_weight: float = DICE_WEIGHT, focal_weight: float = FOCAL_WEIGHT) -> Tensor:
        """Return L_SEG."""
        return self.prior + dice_weight * self.dice + focal_weight * self.focal


def prior_losses(
    prior_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    ignore: Tensor,
    included: Tensor | None = None,
) -> PriorLosses:
    """Compute the terms of L_SEG (eq. 8).

    The prior is compared with the mask at the resolution of the prior, where labels are fractions of foreground. The
    mask logits are resized to the labels.

    Args:
        prior_logits: (B, 1, H, W).
        mask_logits: (B, 1, H, W).
        labels: (B, S, S), 0 or 1, in the frame of SAM's input.
        ignore: (B, S, S) bool, true at padding and at ignored pixels.
        included: (B,) bool, the rows to average over; all by default. Without any row, the terms are 0.
    """
    labels, ignore = labels[:, None].to(mask_logits.device), ignore[:, None].to(mask_logits.device)
    size = prior_logits.shape[-2:]
    valid = (~ignore).float()
    coverage = nn.functional.interpolate(valid, size=size, mode="area")
    fraction = nn.functional.interpolate(labels.float() * valid, size=size, mode="area") / coverage.clamp(
        min=1e-6
    )
    masks = nn.functional.interpolate(mask_logits.float(), size=labels.shape[-2:], mode="bilinear")
    rows = range(len(labels)) if included is None else included.nonzero()[:, 0].tolist()
    terms = [
        torch.stack(
            [
                _cross_entropy(prior_logits[row], fraction[row], coverage[row] >= 0.5),
                dice_loss(masks[row][None], labels[row][None], ignore[row][None]),
                focal_loss(masks[row][None], labels[row][None], ignore=ignore[row][None]),
            ]
        )
        for row in rows
    ]
    if not terms:
        zero = (prior_logits.sum() + mask_logits.sum()) * 0
        return PriorLosses(zero, zero, zero)
    return PriorLosses(*torch.stack(terms).mean(dim=0))


def _cross_entropy(logits: Tensor, fractions: Tensor, valid: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over valid pixels; 0 if there are none."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits.float(), fractions, reduction="none")
    return (losses * valid).sum() / valid.sum().clamp(min=1)
