"""Adapter of the SAM backbones: image features once, and masks from a positional prior as the mask prompt.

The vision encoder is frozen. The prompt encoder and the mask decoder are trained; the projections of high-resolution
features are part of a tracker's mask decoder, so image features are stored without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Sam: TypeAlias = Any
"""A `SamModel` or a `Sam3TrackerModel`."""

NO_SPLIT_MODULES = [
    "SamVisionLayer",
    "Sam3ViTLayer",
    "SamTwoWayAttentionBlock",
    "Sam3TrackerTwoWayAttentionBlock",
]


@dataclass(frozen=True)
class PriorFeatures:
    """SAM's image features of B images.

    Attributes:
        levels: (B, D, h, w) feature maps from fine to coarse; a `SamModel` has one.
    """

    levels: tuple[Tensor, ...]

    @property
    def keys(self) -> Tensor:
        """The feature map that the prior attends to, the coarsest one."""
        return self.levels[-1]

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.levels[-1].device

    def select(self, rows: Tensor) -> PriorFeatures:
        """Return the features of some images."""
        rows = rows.to(self.device)
        return PriorFeatures(tuple(level[rows] for level in self.levels))

    def to(self, device: torch.device) -> PriorFeatures:
        """Return the features on a device."""
        return PriorFeatures(tuple(level.to(device) for level in self.levels))

    @staticmethod
    def concatenate(parts: Sequence[PriorFeatures]) -> PriorFeatures:
        """Concatenate features along the batch dimension."""
        return PriorFeatures(tuple(map(torch.cat, zip(*(part.levels for part in parts), strict=True))))


def sam_classes() -> dict[str, Any]:
    """Return the classes of SAM by `model_type`; they are imported on first use."""
    from transformers import Sam3TrackerModel, SamModel

    return {"sam": SamModel, "sam3_tracker": Sam3TrackerModel}


def make_sam(config: PreTrainedConfig) -> Sam:
    """Create the SAM of a configuration, in float32."""
    return sam_classes()[config.model_type]._from_config(config, dtype=torch.float32)


def set_single_mask(sam: Sam) -> None:
    """Disable the selection among several masks, which a tracker applies in eval mode only."""
    if hasattr(sam.mask_decoder, "dynamic_multimask_via_stability"):
        sam.mask_decoder.dynamic_multimask_via_stability = False
        sam.config.mask_decoder_config.dynamic_multimask_via_stability = False


def freeze_encoder(sam: Sam) -> None:
    """Freeze all of SAM but what decodes a mask prompt to a mask, and set the vision encoder to eval mode."""
    sam.requires_grad_(False)
    sam.prompt_encoder.mask_embed.requires_grad_(True)
    decoder = sam.mask_decoder
    decoder.requires_grad_(True)
    # These predict the quality of masks, the presence of an object, and further masks.
    for unused in (
        decoder.iou_prediction_head,
        *decoder.output_hypernetworks_mlps[1:],
        getattr(decoder, "pred_obj_score_head", None),
    ):
        if unused is not None:
            unused.requires_grad_(False)
    sam.vision_encoder.eval()


def detach_encoder(sam: Sam) -> nn.Module:
    """Remove the vision encoder from the module tree of SAM, whose methods still use it; see `detach_sam`."""
    if "vision_encoder" in sam._modules:
        sam.__dict__["vision_encoder"] = sam._modules.pop("vision_encoder")
    return sam.vision_encoder


@torch.no_grad()
def encode_image(sam: Sam, pixel_values: Tensor) -> PriorFeatures:
    """Encode (B, 3, S, S) images."""
    output = sam.vision_encoder(pixel_values)
    if sam.config.model_type == "sam":
        return PriorFeatures((output.last_hidden_state,))
    levels = list(output.fpn_hidden_states)
    levels[-1] = levels[-1] + sam.no_memory_embedding.reshape(1, -1, 1, 1)  # as in Sam3TrackerModel
    return PriorFeatures(tuple(levels[: len(sam.backbone_feature_sizes)]))


def decode(sam: Sam, features: PriorFeatures, prior: Tensor) -> Tensor:
    """Decode masks from priors, differentiable in both.

    Args:
        sam: SAM.
        features: Features of B images.
        prior: (B, 1, H, W) logits of the prior, which are the mask prompt.

    Returns:
        (B, 1, H, W) mask logits.
    """
    embeddings: Any = features.keys
    if len(features.levels) > 1:
        fine, middle, coarse = features.levels
        embeddings = [sam.mask_decoder.conv_s0(fine), sam.mask_decoder.conv_s1(middle), coarse]
    output = sam(image_embeddings=embeddings, input_masks=prior, multimask_output=False)
    return output.pred_masks[:, 0]


def parameters_of_decoder(sam: Sam) -> int:
    """Return the number of parameters of prompt encoder and mask decoder."""
    modules: tuple[nn.Module, ...] = (sam.prompt_encoder, sam.mask_decoder)
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
