"""Preset configurations of the published model sizes and the embedded checkpoint."""

from __future__ import annotations

from typing import Any

_VISION_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""Ids of vision tokens, which Qwen2.5-VL and Qwen3-VL share."""


def _qwen2_5_vl(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    vocab_size: int,
    tie_word_embeddings: bool,
) -> dict[str, Any]:
    """Return the published configuration of a Qwen2.5-VL model."""
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tie_word_embeddings,
        **_VISION_TOKENS,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    }


def _qwen3_vl(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    vision_config: dict[str, Any],
    tie_word_embeddings: bool,
) -> dict[str, Any]:
    """Return the published configuration of a dense Qwen3-VL model."""
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tie_word_embeddings,
        **_VISION_TOKENS,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            **vision_config,
        },
    }


_QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_QWEN3_LARGE_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _preset_qwen3_2b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen3_vl(2048, 6144, 28, 16, _QWEN3_VISION, tie_word_embeddings=True),
        "ctm_config": {"hidden_size": 2048},
    }


def _preset_qwen3_4b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen3_vl(2560, 9728, 36, 32, _QWEN3_VISION, tie_word_embeddings=True),
        "ctm_config": {"hidden_size": 2560},
    }


def _preset_qwen3_8b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen3_vl(4096, 12288, 36, 32, _QWEN3_LARGE_VISION, tie_word_embeddings=False),
        "ctm_config": {"hidden_size": 4096},
    }


def _preset_3b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True),
        "ctm_config": {"hidden_size": 2048},
    }


def _preset_7b() -> dict[str, Any]:
    return {
        "vlm_config": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
        "ctm_config": {"hidden_size": 3584},
    }


NANO_IMAGE_SIZE = 128
NANO_VLM_VOCABULARY_SIZE = 384
NANO_SAM_VOCABULARY_SIZE = 176
NANO_SAM_TEXT_LENGTH = 8

MINI_IMAGE_SIZE = 224
MINI_PATCH_SIZE = 14
MINI_VLM_VOCABULARY_SIZE = 704
MINI_SAM_VOCABULARY_SIZE = 512
MINI_SAM_TEXT_LENGTH = 12


def _preset_nano() -> dict[str, Any]:
    """Return a configuration small enough to train on a laptop, with the same classes as the large models."""
    width, sam_width = 128, 64
    return {
        "vlm_config": {
            **_small_vlm(NANO_VLM_VOCABULARY_SIZE, width, intermediate_size=384, num_heads=4),
            "vision_config": _small_vision(
                width, NANO_IMAGE_SIZE, depth=3, hidden_size=64, full_attention=[0, 1, 2]
            ),
        },
        "sam_config": _small_sam(
            sam_width,
            NANO_SAM_VOCABULARY_SIZE,
            NANO_SAM_TEXT_LENGTH,
            backbone={
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": NANO_IMAGE_SIZE,
                "pretrain_image_size": NANO_IMAGE_SIZE,
                "window_size": 8,
                "global_attn_indexes": [1, 3],
            },
            scale_factors=[2.0, 1.0, 0.5, 0.5],
        ),
        "ctm_config": {"hidden_size": width, "num_attention_heads": 4, "sam_hidden_size": sam_width},
    }


def _preset_nano_qwen3() -> dict[str, Any]:
    """Return the configuration of nano with a Qwen3-VL of the same size."""
    nano = _preset_nano()
    text, vision = nano["vlm_config"]["text_config"], nano["vlm_config"]["vision_config"]
    text = {
        **text,
        "model_type": "qwen3_vl_text",
        "head_dim": text["hidden_size"] // text["num_attention_heads"],
        "rope_parameters": {**text["rope_parameters"], "mrope_interleaved": True},
    }
    vision = {
        **vision,
        "model_type": "qwen3_vl_vision",
        "num_position_embeddings": (NANO_IMAGE_SIZE // vision["patch_size"]) ** 2,
        "deepstack_visual_indexes": [0, 1],
    }
    for name in ("window_size", "fullatt_block_indexes"):
        del vision[name]
    vlm = {**nano["vlm_config"], "model_type": "qwen3_vl", "text_config": text, "vision_config": vision}
    return {**nano, "vlm_config": vlm}


def _preset_mini() -> dict[str, Any]:
    """Return a configuration for photographs that can be trained on a CPU, with 16 x 16 patches per image."""
    width, sam_width = 192, 64
    return {
        "vlm_config": {
            **_small_vlm(MINI_VLM_VOCABULARY_SIZE, width, intermediate_size=384, num_heads=6),
            "vision_config": {
                **_small_vision(
                    width, MINI_IMAGE_SIZE, depth=4, hidden_size=112, full_attention=[0, 1, 2, 3]
                ),
                "patch_size": MINI_PATCH_SIZE,
            },
        },
        "sam_config": _small_sam(
            sam_width,
            MINI_SAM_VOCABULARY_SIZE,
            MINI_SAM_TEXT_LENGTH,
            backbone={
                "hidden_size": 192,
                "intermediate_size": 576,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "image_size": MINI_IMAGE_SIZE,
                "pretrain_image_size": MINI_IMAGE_SIZE,
                "patch_size": MINI_PATCH_SIZE,
                "window_size": 8,
                "global_attn_indexes": [2, 5],
            },
            scale_factors=[4.0, 2.0, 1.0, 0.5],
        ),
        "ctm_config": {
            "hidden_size": width,
            "num_attention_heads": 6,
            "mlp_ratio": 2,
            "sam_hidden_size": sam_width,
        },
    }


def _small_vlm(vocab_size: int, hidden_size: int, intermediate_size: int, num_heads: int) -> dict[str, Any]:
    """Return a configuration of Qwen2.5-VL with six layers, heads of 32 channels, and small images."""
    return {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        # The first tokens of the tokenizers of small checkpoints, in order.
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "image_token_id": 5,
        "video_token_id": 6,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": 6,
            "num_attention_heads": num_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "initializer_range": 0.04,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
        },
    }


def _small_vision(
    out_hidden_size: int, image_size: int, depth: int, hidden_size: int, full_attention: list[int]
) -> dict[str, Any]:
    """Return a configuration of Qwen2.5-VL's vision tower with patches of 8 pixels."""
    return {
        "model_type": "qwen2_5_vl",
        "depth": depth,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_heads": 4,
        "out_hidden_size": out_hidden_size,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "window_size": image_size,
        "fullatt_block_indexes": full_attention,
        "initializer_range": 0.04,
    }


def _small_sam(
    width: int, vocab_size: int, text_length: int, backbone: dict[str, Any], scale_factors: list[float]
) -> dict[str, Any]:
    """Return a configuration of SAM 3 with patches of 8 pixels by default, and two layers in each transformer."""
    backbone = {"model_type": "sam3_vit_model", "patch_size": 8, **backbone}
    grid = backbone["image_size"] // backbone["patch_size"]
    transformer = {"hidden_size": width, "num_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    return {
        "vision_config": {
            "backbone_config": backbone,
            "fpn_hidden_size": width,
            "backbone_feature_sizes": [[round(grid * factor)] * 2 for factor in scale_factors[:3]],
            "scale_factors": scale_factors,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 128,
            "projection_dim": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": text_length,
            "hidden_act": "gelu",
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "geometry_encoder_config": {
            **transformer,
            "num_layers": 1,
            "intermediate_size": 128,
            "roi_size": 3,
        },
        "detr_encoder_config": {**transformer, "intermediate_size": 192},
        "detr_decoder_config": {**transformer, "num_queries": 8, "intermediate_size": 192},
        "mask_decoder_config": {
            "hidden_size": width,
            "num_attention_heads": 4,
            "num_upsampling_stages": 2,
        },
    }


PRESETS = {
    "3b": _preset_3b,
    "7b": _preset_7b,
    "qwen3-2b": _preset_qwen3_2b,
    "qwen3-4b": _preset_qwen3_4b,
    "qwen3-8b": _preset_qwen3_8b,
    "nano": _preset_nano,
    "nano-qwen3": _preset_nano_qwen3,
    "mini": _preset_mini,
}
