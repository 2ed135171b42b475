"""The segmentation loss L_seg = dice + focal (eq. 5), averaged over the batch and computed in float32."""

from __future__ import annotations

from torch import Tensor, nn


def dice_loss(logits: Tensor, labels: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Compute the soft dice loss.

    Args:
        logits: (B, ..., H, W) mask logits.
        labels: Same shape, 0 or 1 (bool or any number type).
        ignore: Same shape, bool, true at ignored pixels.

    Returns:
        Scalar in [0, 1]. A smoothing term of one pixel makes the loss of an empty prediction for an empty mask zero.
    """
    probabilities = logits.float().sigmoid().flatten(1)
    targets = labels.to(probabilities).flatten(1)
    if ignore is not None:
        valid = ~ignore.flatten(1)
        probabilities, targets = probabilities * valid, targets * valid
    overlap = (probabilities * targets).sum(1)
    return (1 - (2 * overlap + 1) / (probabilities.sum(1) + targets.sum(1) + 1)).mean()


def focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0, ignore: Tensor | None = None
) -> Tensor:
    """Compute the sigmoid focal loss (Lin et al., 2017), averaged over all pixels that are not ignored.

    Args:
        logits: (B, ..., H, W) mask logits.
        labels: Same shape, 0 or 1 (bool or any number type).
        alpha: Weight of foreground pixels; the weight of background pixels is `1 - alpha`. Negative for no weighting.
        gamma: Focusing parameter that down-weights well-classified pixels; 0 for (weighted) cross-entropy.
        ignore: Same shape, bool, true at ignored pixels; the loss is 0 if all pixels are ignored.
    """
    logits = logits.float()
    targets = labels.to(logits)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # exp(-cross_entropy) is the probability of the true class.
    loss = cross_entropy * (1 - (-cross_entropy).exp()) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    if ignore is None:
        return loss.mean()
    return (loss * ~ignore).sum() / (~ignore).sum().clamp(min=1)


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the segmentation loss L_seg (eq. 5).

    Args:
        logits: (B, 1, h, w) mask logits, resized (bilinear) to the size of the labels.
        labels: (B, H, W) or (B, 1, H, W), 0 or 1 (bool or any number type).
        focal_alpha: See `focal_loss`; -1 together with `focal_gamma=0` gives the binary cross-entropy of the released
            code.
        focal_gamma: See `focal_loss`.
        ignore: Shape of the labels, bool, true at ignored pixels.

    Returns:
        `(loss, dice, focal)`, three scalars with `loss = dice + focal`.

    Raises:
        ValueError: If the batch sizes differ or the labels are not a batch of masks.
    """
    if labels.ndim == 3:
        labels, ignore = labels[:, None], None if ignore is None else ignore[:, None]
    if labels.ndim != 4 or labels.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"segmentation_loss: labels of shape {tuple(labels.shape)} do not match logits of shape "
            f"{tuple(logits.shape)}; pass one (H, W) mask per row."
        )
    logits = nn.functional.interpolate(
        logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
    )
    dice = dice_loss(logits, labels, ignore)
    focal = focal_loss(logits, labels, focal_alpha, focal_gamma, ignore)
    return dice + focal, dice, focal
