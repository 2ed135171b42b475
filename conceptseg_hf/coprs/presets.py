"""Preset configurations of CoPRS."""

from __future__ import annotations

from typing import Any

from ..presets import PRESETS as CONCEPTSEG_PRESETS

_VISION = {  # width, layers, heads and global attention layers of the SAM backbones of Table 4
    "b": (768, 12, 12, [2, 5, 8, 11]),
    "l": (1024, 24, 16, [5, 11, 17, 23]),
    "h": (1280, 32, 16, [7, 15, 23, 31]),
}


def sam_config(vision: str = "h") -> dict[str, Any]:
    """Return the published configuration of SAM.

    Args:
        vision: Vision backbone: `"b"`, `"l"` or `"h"` (ViT-B, ViT-L or ViT-H; the paper uses ViT-H).
    """
    width, layers, heads, global_layers = _VISION[vision]
    return {
        "model_type": "sam",
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "global_attn_indexes": global_layers,
            "mlp_dim": 4 * width,
        },
    }


def _published(name: str) -> dict[str, Any]:
    return {"vlm_config": CONCEPTSEG_PRESETS[name]()["vlm_config"], "sam_config": sam_config()}


def _small(name: str) -> dict[str, Any]:
    """Return the VLM of a small checkpoint with the vision backbone of its SAM 3 and a tracker's mask decoder.

    The keys have a resolution of 16 x 16; the feature pyramid of nano has one level more than its SAM 3.
    """
    preset = CONCEPTSEG_PRESETS[name]()
    vision = preset["sam_config"]["vision_config"]
    width, patch = vision["fpn_hidden_size"], vision["backbone_config"]["patch_size"]
    image_size = vision["backbone_config"]["image_size"]
    grid = image_size // patch
    return {
        "vlm_config": preset["vlm_config"],
        "sam_config": {
            "model_type": "sam3_tracker",
            "vision_config": {
                **vision,
                "model_type": "sam3_vision_model",
                "scale_factors": [4.0, 2.0, 1.0],
                "backbone_feature_sizes": [[grid * factor] * 2 for factor in (4, 2, 1)],
            },
            "prompt_encoder_config": {
                "hidden_size": width,
                "image_size": image_size,
                "patch_size": patch,
                "mask_input_channels": 16,
            },
            "mask_decoder_config": {
                "hidden_size": width,
                "num_attention_heads": 4,
                "mlp_dim": 192,
                "iou_head_hidden_dim": 32,
                "num_multimask_outputs": 1,
            },
        },
        "head_dim": 16,
        "max_new_tokens": 64,
        "ref_pos_token_id": 0,
    }


PRESETS = {
    "3b": lambda: _published("3b"),
    "7b": lambda: _published("7b"),
    "nano": lambda: _small("nano"),
    "mini": lambda: _small("mini"),
}
