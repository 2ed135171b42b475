"""The positional prior (eq. 2, Algorithm 1): where the concentration token looks in the image."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_coprs import CoPRSConfig


class PositionalPrior(nn.Module):
    """Multi-head scaled dot products of a query and image keys without softmax, fused by two convolutions.

    The query head and the projections W_i^Q of eq. 2 are one linear map, as in the released code; the projections W_i^K
    are a 1 x 1 convolution.
    """

    def __init__(self, config: CoPRSConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        width = config.num_heads * config.head_dim
        self.query_head = nn.Linear(config.hidden_size, width, bias=False)
        self.key_projection = nn.Conv2d(config.key_size, width, kernel_size=1, bias=False)
        self.fusion = nn.Sequential(
            nn.Conv2d(config.num_heads, config.num_heads, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(config.num_heads, 1, kernel_size=3, padding=1),
        )

    def forward(self, states: Tensor, image_features: Tensor) -> Tensor:
        """Compute the prior at the resolution of the image features.

        Args:
            states: (B, C) hidden states of the concentration tokens.
            image_features: (B, D, h, w) SAM's image features.

        Returns:
            (B, 1, h, w) logits.
        """
        query = self.query_head(states.to(self.query_head.weight.dtype)).unflatten(-1, (self.num_heads, -1))
        keys = self.key_projection(image_features.to(self.key_projection.weight.dtype))
        scores = torch.einsum("bnd,bndhw->bnhw", query, keys.unflatten(1, (self.num_heads, -1)))
        return self.fusion(scores / math.sqrt(self.head_dim))

    @torch.no_grad()
    def initialize(self, config: CoPRSConfig) -> None:
        """Initialize the weights; the prior starts at a low probability everywhere."""
        init.normal_(self.query_head.weight, std=config.initializer_range)
        init.normal_(self.key_projection.weight, std=config.initializer_range)
        first, last = cast("nn.Conv2d", self.fusion[0]), cast("nn.Conv2d", self.fusion[2])
        for layer, bias in ((first, 0.0), (last, config.prior_bias)):
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            init.constant_(cast("Tensor", layer.bias), bias)


def resample_prior(prior: Tensor, padding: Tensor, padding_logit: float) -> Tensor:
    """Resample a prior to the resolution of SAM's mask prompt.

    Args:
        prior: (B, 1, h, w) logits.
        padding: (B, 1, H, W) bool, true where SAM's input is padded; see `padding_mask`.
        padding_logit: Value of the padding.

    Returns:
        (B, 1, H, W) logits.
    """
    resampled = nn.functional.interpolate(
        prior, size=padding.shape[-2:], mode="bilinear", align_corners=False
    )
    return resampled.masked_fill(padding, padding_logit)


def padding_mask(valid_sizes: Tensor, image_size: int, size: int) -> Tensor:
    """Return which pixels of a square map have their center in the padding of SAM's input.

    Args:
        valid_sizes: (B, 2) height and width in pixels of the image within SAM's input, at its top left.
        image_size: Side length of SAM's input in pixels.
        size: Side length of the map.

    Returns:
        (B, 1, size, size) bool.
    """
    centers = (torch.arange(size, device=valid_sizes.device) + 0.5) * (image_size / size)
    outside = centers[None] >= valid_sizes[..., None]  # (B, 2, size)
    return (outside[:, 0, :, None] | outside[:, 1, None, :])[:, None]
